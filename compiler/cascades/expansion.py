"""A traced graph as one cascade: every primitive call becomes its fragment, plain operations become maps and sums.

An operation whose equation is not known is taken as one that needs all of what it reads: safe, never too optimistic.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..nodes import op_name
from .attend_fragment import attend_fragment
from .building import Builder, Dim, Held
from .einsum import Cascade
from .row_fragments import (
    chosen_fragment,
    gather_fragment,
    group_fragment,
    merge_fragment,
    reduce_fragment,
    route_fragment,
    scatter_fragment,
)
from .scan_fragment import prefix_fragment, scan_fragment

FRAGMENTS: dict[str, Callable[[Builder, str, Any], list[Held]]] = {
    "attend": attend_fragment,
    "scan": scan_fragment,
    "prefix": prefix_fragment,
    "merge": merge_fragment,
    "reduce_kv": reduce_fragment,
    "route": route_fragment,
    "group": group_fragment,
    "gather": gather_fragment,
    "scatter": scatter_fragment,
    "chosen": chosen_fragment,
}
PORTS: dict[str, tuple[str, ...]] = {  # the ranks of what a mechanism is given
    "q": ("b", "h", "p", "e"), "q_nope": ("b", "h", "p", "e"), "k": ("b", "h", "m", "e"), "v": ("b", "h", "m", "f"),
    "k_nope": ("b", "h", "m", "e"), "o": ("b", "h", "p", "f"), "x": ("b", "p", "c"), "x_kv": ("b", "m", "c"),
    "key_padding": ("b", "m"), "bias": ("b", "h", "p", "m"),
}  # fmt: skip
_NAMES = {"add": "+", "sub": "-", "mul": "*", "div": "/", "true_divide": "/"}
_CALLS = {"exp": "exp", "log": "log", "relu": "relu", "sigmoid": "sigmoid", "tanh": "tanh", "softplus": "softplus",
          "abs": "abs", "sqrt": "sqrt", "sin": "sin", "cos": "cos", "elu": "elu"}  # fmt: skip
_MOVED = frozenset({"transpose", "permute", "unsqueeze", "squeeze", "expand", "view", "reshape", "t", "alias", "detach",
                    "contiguous", "clone", "to", "_to_copy", "flatten", "unflatten", "mT", "numpy_T"})  # fmt: skip
_ALONG = {"slice": (1, 0), "sort": (1, -1), "argsort": (1, -1), "cat": (1, 0), "scatter": (1, -1), "gather": (1, -1),
          "topk": (2, -1), "cumsum": (1, -1), "roll": (2, 0)}  # where the dimension stands  # fmt: skip
_SUMS = {"sum": "sum", "mean": "sum", "amax": "max", "amin": "min"}


@dataclass(frozen=True)
class Expanded:
    """The cascade of a graph, its keys' and queries' ranks, and which graph input each operand is."""

    cascade: Cascade
    keys: tuple[str, ...]
    queries: tuple[str, ...]
    inputs: Mapping[str, str]  # operand, or table that is looked up -> placeholder


def expand(graph: fx.GraphModule, ranks: Mapping[str, Sequence[str]] = PORTS) -> Expanded:
    """Every node of a traced forward, in order."""
    work = _Expansion(Builder(), ranks)
    outputs: list[Held] = []
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            work.placeholder(node)
        elif node.op == "output":
            outputs = [work.held[n] for n in node.all_input_nodes[:1] if n in work.held]
        elif node.op == "get_attr":
            work.held[node] = work.fresh(node, "C")
        else:
            work.call(node)
    cascade = work.b.cascade(tuple(h.name for h in outputs))
    keys, queries = (tuple(dict.fromkeys(map(work.b.find, (r,)))) for r in ("m", "p"))
    present = set(cascade.all_ranks)
    return Expanded(cascade, tuple(r for r in keys if r in present) or queries, queries, work.inputs)


class _Expansion:
    def __init__(self, b: Builder, ranks: Mapping[str, Sequence[str]]) -> None:
        self.b, self.ranks = b, ranks
        self.held: dict[fx.Node, Any] = {}
        self.inputs: dict[str, str] = {}
        for word in {r for own in PORTS.values() for r in own}:
            b.counts[word] = 1  # ranks with a letter of their own

    def placeholder(self, node: fx.Node) -> None:
        known = self.ranks.get(node.name)
        shape = _shape(node.meta.get("val"))
        if known is None or len(known) != len(shape):
            self.held[node] = self.fresh(node, "".join(c for c in node.name.title() if c.isalnum()))
        else:
            dims = tuple(() if size == 1 and r not in "bhpm" else (r,) for r, size in zip(known, shape))
            word = node.name.upper() if len(node.name) == 1 else node.name.title().replace("_", "")
            self.held[node] = self.b.operand(word, dims)
        self.inputs[self.held[node].name] = node.name

    def fresh(self, node: fx.Node, word: str) -> Held:
        """A tensor from outside, with ranks that are not known yet."""
        made = self.b.operand(word, self._new_dims(_shape(node.meta.get("val"))))
        self.inputs[made.name] = str(node.target)
        return made

    def _new_dims(self, shape: Sequence[Any]) -> tuple[Dim, ...]:
        return tuple(() if size == 1 else (self.b.rank("x"),) for size in shape)

    def call(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            source = self.held.get(_args(node)[0])
            self.held[node] = source[_args(node)[1]] if isinstance(source, list) else source
        elif not _tensors(node):
            return  # arithmetic on sizes
        elif str(node.target).startswith("reattend."):
            self.held[node] = self._primitive(node)
        else:
            self.held[node] = self._plain(node)

    def _primitive(self, node: fx.Node) -> list[Held]:
        *tensors, text = _args(node)
        groups = [[self.held[n] for n in (group if isinstance(group, list | tuple) else [group])] for group in tensors]
        return FRAGMENTS[op_name(node)](self.b, str(text), groups)

    def _plain(self, node: fx.Node) -> Any:
        name = op_name(node).rstrip("_")
        given = [self.held[n] for n in node.all_input_nodes if isinstance(self.held.get(n), Held)]
        shape = _shape(node.meta.get("val"))
        if not given:
            return self.fresh(node, "C")
        if name in _MOVED:
            moved = self._moved(name, node, given[0], shape)
            if moved is not None:
                return Held(given[0].name, moved)
        if name in ("matmul", "bmm", "mm") and len(given) == 2:
            return self._product(given[0], given[1], shape)
        if name in ("zeros_like", "ones_like"):
            return Held(self.b.node("EL", given[0].ranks, str(_text(name, [given[0].name]))), given[0].dims)
        if name == "linear":
            return self._linear(given)
        if name == "softmax" and len(_args(node)) > 1:
            return self._softmax(given[0], int(_args(node)[1]))
        if name in _ALONG:
            return self._along(name, node, given)
        if name in _SUMS and len(_args(node)) > 1:
            return self._sum(node, name, given[0], shape)
        if torch.Tag.pointwise in getattr(node.target, "tags", ()):
            return self._pointwise(name, node, given, shape)
        return self._opaque(name, given, shape, node)

    # --- plain operations ---------------------------------------------------------------------------------------------

    def _moved(self, name: str, node: fx.Node, t: Held, shape: Sequence[Any]) -> tuple[Dim, ...] | None:
        """The same values with their dimensions in another place."""
        args = _args(node)
        n = len(t.dims)
        if name in ("transpose",):
            a, c = (int(x) % n for x in args[1:3])
            dims = list(t.dims)
            dims[a], dims[c] = dims[c], dims[a]
            return tuple(dims)
        if name in ("mT", "numpy_T", "t"):
            return (*t.dims[:-2], t.dims[-1], t.dims[-2])
        if name == "permute":
            return tuple(t.dims[int(d) % n] for d in args[1])
        if name == "unsqueeze":
            at = int(args[1]) % (n + 1)
            return (*t.dims[:at], (), *t.dims[at:])
        if name == "expand":
            return tuple([()] * (len(shape) - n)) + t.dims
        if len(shape) == n and name not in ("squeeze",) and shape == _shape(args[0].meta.get("val")):
            return t.dims
        if name == "squeeze":
            kept = [d for d in t.dims if d]
            return tuple(kept) if len(kept) == len(shape) else None
        return _regrouped(t.dims, _shape(args[0].meta.get("val")), shape)

    def _product(self, a: Held, c: Held, shape: Sequence[Any]) -> Held:
        e = a.dims[-1]
        self.b.same_dims(e, c.dims[-2])
        head = self._broadcast([a.dims[:-2], c.dims[:-2]])
        dims = (*head, a.dims[-2], c.dims[-1])
        ranks = tuple(dict.fromkeys(r for dim in dims for r in dim))
        summed: dict[str, Any] = {"kind": "reduce", "monoid": "sum", "over": e} if e else {}
        return Held(self.b.node("MM", ranks, f"{a.name} * {c.name}", **summed), dims)

    def _linear(self, given: Sequence[Held]) -> Held:
        """x W^T + bias: a product like any other."""
        x, w = given[0], given[1]
        c, new = x.dims[-1], w.dims[0]
        self.b.same_dims(c, w.dims[1])
        dims = (*x.dims[:-1], new)
        ranks = tuple(r for dim in dims for r in dim)
        made = self.b.node("MM", ranks, f"{x.name} * {w.name}", "reduce", monoid="sum", over=c)
        if len(given) > 2:
            self.b.same_dims(new, given[2].dims[0])
            made = self.b.node("EL", ranks, f"{made} + {given[2].name}")
        return Held(made, dims)

    def _softmax(self, t: Held, axis: int) -> Held:
        over = t.dims[axis]
        left = tuple(r for r in t.ranks if r not in over)
        top = self.b.node("GM", left, t.name, "reduce", monoid="max", over=over)
        raw = self.b.node("SN", t.ranks, f"exp({t.name} - {top})")
        total = self.b.node("SD", left, raw, "reduce", monoid="sum", over=over)
        return Held(self.b.node("A", t.ranks, f"{raw} / {total}"), t.dims)

    def _along(self, name: str, node: fx.Node, given: Sequence[Held]) -> Any:
        """An operation along one dimension: it needs all of that one, the others stay as they are."""
        place, default = _ALONG[name]
        told: Any = _args(node)[place] if len(_args(node)) > place else node.kwargs.get("dim", default)
        first = max(given, key=lambda t: len(t.dims))
        axis = int(told) % len(first.dims)
        value = node.meta.get("val")
        old = _shape(node.all_input_nodes[0].meta.get("val"))
        if name == "slice" and _shape(value) == old:
            return first
        for other in given:
            if len(other.dims) == len(first.dims):
                for k, (mine, its) in enumerate(zip(first.dims, other.dims)):
                    if k != axis:
                        self.b.same_dims(mine, its)
        also = tuple(dict.fromkeys(t.name for t in given if t.name != first.name))
        over = tuple(dict.fromkeys(r for t in given if len(t.dims) == len(first.dims) for r in t.dims[axis]))

        def made(shape: Sequence[Any]) -> Held:
            new: Dim = (
                ()
                if shape[axis] == 1
                else first.dims[axis]
                if str(shape[axis]) == str(old[axis])
                else (self.b.rank("x"),)
            )
            dims = (*first.dims[:axis], new, *first.dims[axis + 1 :])
            ranks = tuple(r for dim in dims for r in dim)
            return Held(self.b.node("OP", ranks, first.name, "global", monoid=name, over=over, also=also), dims)

        return [made(_shape(v)) for v in value] if isinstance(value, list | tuple) else made(_shape(value))

    def _sum(self, node: fx.Node, name: str, t: Held, shape: Sequence[Any]) -> Held:
        n = len(t.dims)
        given = _args(node)[1]
        axes = {int(d) % n for d in (given if isinstance(given, list | tuple) else [given])}
        keep = len(shape) == n
        dims = tuple(() if k in axes else d for k, d in enumerate(t.dims) if keep or k not in axes)
        over = tuple(r for k in sorted(axes) for r in t.dims[k])
        ranks = tuple(r for d in dims for r in d)
        if not over:
            return Held(t.name, dims)
        made = self.b.node("RS", ranks, t.name, "reduce", monoid=_SUMS[name], over=over)
        if name == "mean":
            count = self.b.node("RN", (), "1.0 + 0.0 * " + self._ones(t, over), "reduce", monoid="sum", over=over)
            made = self.b.node("RM", ranks, f"{made} / {count}")
        return Held(made, dims)

    def _ones(self, t: Held, over: Sequence[str]) -> str:
        dims = tuple((r,) for r in over)
        return self.b.operand("ONE", dims).name

    def _broadcast(self, every: Sequence[Sequence[Dim]]) -> tuple[Dim, ...]:
        """Dimensions lined up from the last; those that run together are one rank."""
        longest = max(map(len, every))
        found: list[Dim] = []
        for back in range(longest, 0, -1):
            here = [dims[-back] for dims in every if len(dims) >= back and dims[-back]]
            for other in here[1:]:
                self.b.same_dims(here[0], other)
            found.append(here[0] if here else ())
        return tuple(found)

    def _pointwise(self, name: str, node: fx.Node, given: Sequence[Held], shape: Sequence[Any]) -> Held:
        dims = self._broadcast([t.dims for t in given])
        ranks = tuple(dict.fromkeys(r for dim in dims for r in dim))
        words = [h.name if isinstance(h := self._value(a), Held) else a for a in _args(node)]
        text = None if any(isinstance(w, fx.Node) for w in words) or node.kwargs else _text(name, words)
        if text is None:
            also = tuple(dict.fromkeys(t.name for t in given[1:] if t.name != given[0].name))
            return Held(self.b.node("EL", ranks, given[0].name, "opaque", monoid=name, also=also), dims)
        return Held(self.b.node("EL", ranks, text), dims)

    def _value(self, argument: Any) -> Any:
        return self.held.get(argument) if isinstance(argument, fx.Node) else None

    def _opaque(self, name: str, given: Sequence[Held], shape: Sequence[Any], node: fx.Node) -> Any:
        """All of what it reads, before any of what it gives; only the batch stays itself."""
        value = node.meta.get("val")
        if isinstance(value, list | tuple):
            return [self._made(name, given, _shape(v)) for v in value]
        return self._made(name, given, shape)

    def _made(self, name: str, given: Sequence[Held], shape: Sequence[Any]) -> Held:
        first = given[0].dims[0] if given[0].dims and len(shape) > 1 and "b" in given[0].dims[0] else ()
        dims = (first, *self._new_dims(shape[1:])) if first else self._new_dims(shape)
        ranks = tuple(r for dim in dims for r in dim)
        over = tuple(dict.fromkeys(r for t in given for r in t.ranks if r not in first))
        also = tuple(dict.fromkeys(t.name for t in given[1:] if t.name != given[0].name))
        return Held(self.b.node("OP", ranks, given[0].name, "global", monoid=name, over=over, also=also), dims)


def _text(name: str, words: Sequence[Any]) -> str | None:
    """The expression of a pointwise operation, where it has one."""
    plain = [w for w in words if isinstance(w, str | int | float) and not isinstance(w, bool)]
    if len(plain) != len(words):
        return None
    if name in _NAMES and len(words) == 2:
        return f"{words[0]} {_NAMES[name]} ({words[1]})"
    if name == "neg":
        return f"-1 * {words[0]}"
    if name == "pow" and len(words) == 2:
        return f"{words[0]} ** ({words[1]})"
    if name in ("zeros_like", "ones_like"):
        return f"{words[0]} * 0.0" + (" + 1.0" if name == "ones_like" else "")
    if name in ("clamp", "clamp_min") and len(words) == 2:
        return f"maximum({words[0]}, {words[1]})"
    if name in ("maximum", "minimum"):
        return f"{name}({words[0]}, {words[1]})"
    if name in ("clone", "to", "_to_copy"):
        return str(words[0])
    return f"{_CALLS[name]}({words[0]})" if name in _CALLS and len(words) == 1 else None


def _regrouped(dims: Sequence[Dim], old: Sequence[Any], new: Sequence[Any]) -> tuple[Dim, ...] | None:
    """Dimensions flattened together or taken apart again, where sizes say which; else None."""
    ranks: list[tuple[str, Any]] = []
    for dim, size in zip(dims, old):
        if len(dim) == 1:
            ranks.append((dim[0], size))
        elif len(dim) > 1:
            return _split(dims, new)
    found: list[Dim] = []
    at = 0
    for size in new:
        group: list[str] = []
        product: Any = 1
        while at < len(ranks) and str(product) != str(size):
            product = product * ranks[at][1]
            group.append(ranks[at][0])
            at += 1
        if str(product) != str(size):
            return None
        found.append(tuple(group))
    return tuple(found) if at == len(ranks) else None


def _split(dims: Sequence[Dim], new: Sequence[Any]) -> tuple[Dim, ...] | None:
    """Flat dimensions taken apart where there are as many as ranks."""
    flat = [r for dim in dims for r in dim]
    kept = [size for size in new if size != 1]
    if len(flat) != len(kept):
        return None
    left = iter(flat)
    return tuple(() if size == 1 else (next(left),) for size in new)


def _args(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _shape(value: Any) -> tuple[Any, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _tensors(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) or (isinstance(value, list | tuple) and any(isinstance(v, Tensor) for v in value))
