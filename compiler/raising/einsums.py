"""Einsums of one or of many tensors as permutations, sums, factors and einsums of two, which is what raising reads.

The order is torch's own, from the left, but for a tensor whose axes all lie in the result or in one other operand:
that one is a factor. 'bhid,bhjd,h->bhij' is a product of queries and keys, times one number a head; of two operands one
is a factor where nothing is summed: 'bhij,bhi->bhij'.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..nodes import op_name
from .build import Builder, aten
from .layout import tensor_of

Labels = tuple[str, ...]


@dataclass(frozen=True)
class Term:
    """An operand and what its dimensions are called."""

    node: Any
    labels: Labels


def terms_of(node: fx.Node) -> tuple[list[Term], Labels] | None:
    """Operands and result of an einsum with every dimension named, those of an ellipsis too; None for a diagonal."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    if not isinstance(operands, list | tuple):
        return None
    inputs, arrow, out = equation.partition("->")
    written = inputs.split(",")
    rest = [tensor_of(o).ndim - len(t.replace("...", "")) for t, o in zip(written, operands)]
    widest = max((r for t, r in zip(written, rest) if "..." in t), default=0)
    terms = []
    for operand, term, count in zip(operands, written, rest):
        before, dots, after = term.partition("...")
        middle = [f".{d}" for d in range(widest - count, widest)] if dots else []
        terms.append(Term(operand, (*before, *middle, *after)))
    if not arrow:
        single = [c for c in inputs if c.isalpha() and inputs.count(c) == 1]
        out = ("..." if "..." in inputs else "") + "".join(sorted(single))
    before, dots, after = out.partition("...")
    result = (*before, *([f".{d}" for d in range(widest)] if dots else []), *after)
    return None if any(len(set(t.labels)) != len(t.labels) for t in terms) else (terms, result)


def split_einsums(graph: fx.Graph) -> None:
    """Write every einsum that is no product of two tensors as steps that are, or that are none."""
    for node in list(graph.nodes):
        found = terms_of(node) if op_name(node) == "einsum" else None
        if found is not None and (len(found[0]) != 2 or _scales(*found)):
            node.replace_all_uses_with(_Steps(Builder(node, [])).whole(*found))
            graph.erase_node(node)


class _Steps:
    def __init__(self, builder: Builder) -> None:
        self.builder = builder

    def whole(self, terms: Sequence[Term], out: Labels) -> Any:
        """The result's node."""
        if len(terms) == 1:
            return self._summed(terms[0], out)
        if len(terms) == 2:
            small, large = sorted(terms, key=lambda t: len(t.labels))
            return self._times(large, small) if _scales(terms, out) else self._product(terms[0], terms[1], out)
        factor = next((t for t in reversed(terms) if set(t.labels) <= set(out) and self._covered(terms, t, out)), None)
        if factor is not None:
            rest = self.whole([t for t in terms if t is not factor], out)
            return self._times(Term(rest, out), factor)
        for small in reversed(terms):
            for large in terms:
                if large is not small and set(small.labels) <= set(large.labels) and _as_large(small, large):
                    scaled = Term(self._times(large, small), large.labels)
                    return self.whole([scaled if t is large else t for t in terms if t is not small], out)
        first, second, *later = terms
        needed = set(out).union(*(t.labels for t in later))
        kept = tuple(x for x in dict.fromkeys((*first.labels, *second.labels)) if x in needed)
        return self.whole([Term(self._product(first, second, kept), kept), *later], out)

    def _covered(self, terms: Sequence[Term], factor: Term, out: Labels) -> bool:
        """Whether the others alone have every axis of the result, at its full size."""
        sizes = {x: s for t in terms if t is not factor for x, s in zip(t.labels, tensor_of(t.node).shape) if s != 1}
        wide = {x for x, s in zip(factor.labels, tensor_of(factor.node).shape) if s != 1}
        there = set().union(*(t.labels for t in terms if t is not factor))
        return set(out) <= there and wide <= set(sizes)

    def _times(self, large: Term, small: Term) -> Any:
        order = sorted(range(len(small.labels)), key=lambda d: large.labels.index(small.labels[d]))
        node = small.node
        if order != list(range(len(order))):
            node = self.builder.call(aten.permute.default, node, order)
        for dim, label in enumerate(large.labels):
            if small.labels and label not in small.labels:
                node = self.builder.call(aten.unsqueeze.default, node, dim)
        return self.builder.call(aten.mul.Tensor, large.node, node)

    def _product(self, first: Term, second: Term, out: Labels) -> Any:
        letters = dict(zip(dict.fromkeys((*first.labels, *second.labels)), string.ascii_letters))
        said = ["".join(letters[x] for x in labels) for labels in (first.labels, second.labels, out)]
        equation = f"{said[0]},{said[1]}->{said[2]}"
        return self.builder.call(aten.einsum.default, equation, [first.node, second.node])

    def _summed(self, term: Term, out: Labels) -> Any:
        """One tensor's axes in another order, those that the result does not have summed over."""
        gone = [d for d, x in enumerate(term.labels) if x not in out]
        node = self.builder.call(aten.sum.dim_IntList, term.node, gone) if gone else term.node
        left = tuple(x for x in term.labels if x in out)
        if gone and left == out:
            return node
        return self.builder.call(aten.permute.default, node, [left.index(x) for x in out])


def _scales(terms: Sequence[Term], out: Labels) -> bool:
    """Whether the larger of two operands has the result's axes in its order, and the other only some of them."""
    if len(terms) != 2:
        return False
    small, large = sorted(terms, key=lambda t: len(t.labels))
    within = len(small.labels) < len(out) and set(small.labels) <= set(out)
    return within and large.labels == out and _as_large(small, large)


def _as_large(small: Term, large: Term) -> bool:
    """Whether nothing of the small one is wider than the large one, which broadcasting would change."""
    sizes = dict(zip(large.labels, tensor_of(large.node).shape))
    return all(s == 1 or sizes[x] != 1 for x, s in zip(small.labels, tensor_of(small.node).shape))
