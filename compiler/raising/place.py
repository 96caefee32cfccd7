"""One attention found, not yet written: operands with their axes, the score, and who is batch, head, query, key."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..nodes import op_name
from ..primitives.attend import attend_op
from ..primitives.attend_spec import AttendSpec
from ..symbols import TRUE, Expr, as_expr, name
from .axes import Axis, Group, Groups, all_leaves, leaves, same
from .build import INDICES, Builder, aten
from .layout import is_idle, tensor_of
from .near import Unraised
from .operands import Stage, beside_features, best, onward, origin, stages, without_factor
from .weights import DRAWN


@dataclass(frozen=True)
class Operand:
    """A node with its axes."""

    node: fx.Node
    groups: Groups


@dataclass(frozen=True)
class Place:
    """Everything that an attend node says, in terms of axes."""

    node: fx.Node  # what is replaced
    out: Groups  # its axes
    q: Operand
    k: Operand
    v: Operand
    i: Group
    j: Group
    d: Group  # axes that the product sums over
    e: Group  # axes that only the values have
    outer: Groups  # all others, as the scores have them, batch first
    score: Expr
    keep: Expr = TRUE
    after: Expr | None = None
    sink: Expr | None = None
    empty: Expr | None = None  # the score of rows that keep nothing
    heads: Group | None = None  # where the spelling itself says it
    leaves: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)  # with its axes, or its indices


def write(place: Place) -> fx.Node:
    """The attend node in place of what was there; what only led to it is erased."""
    found = {"q": stages(place.q.node, place.q.groups), "k": stages(place.k.node, place.k.groups)}
    found["v"] = without_factor(stages(place.v.node, place.v.groups))
    batch, heads = _batch_and_heads(place, found)
    index = {"b": batch, "h": heads, "i": leaves(place.i), "j": leaves(place.j)}
    q = best(found["q"], (batch, heads, place.i, place.d), (*batch, *heads))
    k, v = _keys_and_values(place, found, batch, heads)
    builder = Builder(place.node, [place.q.node, place.k.node, place.v.node, q.node, k.node, v.node])
    shared = _grouped(k, v, heads)
    tensors = _of_one_dtype(
        builder,
        [
            builder.arranged(q.node, q.groups, (batch, heads, leaves(place.i), leaves(place.d))),
            builder.arranged(k.node, k.groups, (batch, shared, leaves(place.j), leaves(place.d))),
            builder.arranged(v.node, v.groups, (batch, shared, leaves(place.j), leaves(place.e))),
        ],
    )
    tables, words = _tables(place, builder, index)
    scaled = {"s": name("s") * (q.factor * k.factor)} if q.factor * k.factor != 1 else {}
    after, factor = _without_constant(place.after)
    spec = AttendSpec(
        score=_said(place.score.replace(scaled), words),
        keep="" if place.keep.text == TRUE.text else _said(place.keep, words),
        after="" if after is None else _said(after, words),
        sink="" if place.sink is None else _said(place.sink, words),
        empty="" if place.empty is None else _said(place.empty.replace(scaled), words),
    )
    attend = builder.call(attend_op.op, tensors[0], tensors[1:], tables, spec.text)
    result = builder.call(operator.getitem, attend, 0)
    if factor != 1:
        result = builder.call(aten.mul.Tensor, result, factor)
    if tensor_of(result).dtype != tensor_of(place.node).dtype:
        result = builder.call(aten.to.dtype, result, tensor_of(place.node).dtype)
    _put(place, builder, result, (batch, heads, leaves(place.i), leaves(place.e)))
    return attend


def _of_one_dtype(builder: Builder, tensors: list[fx.Node]) -> list[fx.Node]:
    """In the widest that one of them has: rotated queries in float32 meet values that are not (bfloat16)."""
    wide = functools.reduce(torch.promote_types, (tensor_of(t).dtype for t in tensors))
    return [t if tensor_of(t).dtype == wide else builder.call(aten.to.dtype, t, wide) for t in tensors]


def _without_constant(after: Expr | None) -> tuple[Expr | None, float]:
    """Weights that are all scaled alike are plain weights, and their result is scaled."""
    factor = 1.0
    while after is not None and after.op in ("mul", "truediv"):
        weights, number = after.args
        if not isinstance(number, Expr) or number.op != "const":
            break
        factor = factor * number.args[0] if after.op == "mul" else factor / number.args[0]
        after = weights
    return (None if after is None or after.text == "w" else after), factor


def _batch_and_heads(place: Place, found: dict[str, list[Stage]]) -> tuple[Group, Group]:
    """Heads share a dimension with the features somewhere; else they are the last axis in front of queries and keys."""
    if place.heads is not None:
        heads = leaves(place.heads)
        return tuple(a for a in all_leaves(place.outer) if a not in heads), heads
    inner = (*leaves(place.i), *leaves(place.j))
    seen: set[Axis] = set()
    for role in ("q", "k", "v"):
        features = place.e if role == "v" else place.d
        trail = [s.groups for s in found[role]]
        behind = origin(found[role][-1].node, found[role][-1].groups)
        seen |= beside_features([*trail, *(behind.trail if behind else ())], features, inner)
    ahead = [groups for _, groups in onward(place.node, place.out)]
    seen |= beside_features(ahead, place.e, inner)
    outer = all_leaves(place.outer)
    heads = tuple(a for a in outer if a in seen) or _last_axes(place, found["k"])
    return tuple(a for a in outer if a not in heads), heads


def _last_axes(place: Place, keys: list[Stage]) -> Group:
    """The last dimension of the scores before queries and keys; with those before it where keys are shared along it."""
    outer = [leaves(g) for g in place.outer if g]
    there = set(all_leaves(keys[-1].groups))
    heads: Group = ()
    while len(outer) > 1 and all(isinstance(a.size, int) for a in outer[-1]):
        heads = (*outer.pop(), *heads)
        if there & set(heads):
            break
    return heads


def _keys_and_values(place: Place, found: dict[str, list[Stage]], batch: Group, heads: Group) -> tuple[Stage, Stage]:
    """Both with the same heads: as few as both have without copies, but whole groups of consecutive heads."""
    for count in range(len(heads) + 1):
        shared, dropped = heads[:count], heads[count:]
        fits = {r: [s for s in found[r] if not set(dropped) & set(all_leaves(s.groups))] for r in ("k", "v")}
        if all(fits.values()):
            wanted = {"k": (batch, shared, place.j, place.d), "v": (batch, shared, place.j, place.e)}
            optional = (*batch, *shared)
            return best(fits["k"], wanted["k"], optional), best(fits["v"], wanted["v"], optional)
    raise Unraised(place.node, "keys and values have no heads in common")


def _grouped(k: Stage, v: Stage, heads: Group) -> Group:
    """The heads that keys and values have: the outer ones."""
    there = {*all_leaves(k.groups), *all_leaves(v.groups)}
    last = max((p for p, a in enumerate(heads) if a in there), default=-1)
    return heads[: last + 1]


def _tables(place: Place, builder: Builder, index: dict[str, Group]) -> tuple[list[fx.Node], dict[str, Expr]]:
    """The tensors that the texts look up, in order of first use, and the lookup for each name."""
    texts = [e for e in (place.keep, place.score, place.sink, place.after, place.empty) if e is not None]
    used = [w for e in texts for w in sorted(e.names, key=_number) if w.startswith("@")]
    tables: list[fx.Node] = []
    words: dict[str, Expr] = {}
    for word in dict.fromkeys(used):
        if word == DRAWN:
            node, indices = _drawn(place, builder, index), [name(n) for n in INDICES]
        else:
            node, where = place.leaves[word]
            if any(isinstance(w, Expr) for w in where):
                indices = list(where)
            else:
                node, indices = builder.table(node, where, index)
        if node not in tables:
            tables.append(node)
        words[word] = Expr("lookup", (f"t{tables.index(node)}", *map(as_expr, indices)))
    return tables, words


def _number(word: str) -> tuple[int, str]:
    return (int(word[1:]), word) if word[1:].isdigit() else (1 << 30, word)


def _drawn(place: Place, builder: Builder, index: dict[str, Group]) -> fx.Node:
    sizes = [builder.size(index[n]) for n in INDICES]
    device = tensor_of(place.node).device
    return builder.call(aten.rand.default, sizes, dtype=tensor_of(place.q.node).dtype, device=device)


def _said(e: Expr, words: dict[str, Expr]) -> str:
    return e.replace(words).text


def _put(place: Place, builder: Builder, result: fx.Node, groups: Groups) -> None:
    """The result in the old node's layout, or in place of a later node whose layout it already has."""
    node, out = place.node, None
    for later, there in onward(place.node, place.out):
        if same(there, groups) and tensor_of(later).dtype == tensor_of(result).dtype:
            node, out = later, result
            break
    if out is None:
        out = builder.arranged(result, groups, place.out)
    node.replace_all_uses_with(out)
    _erase(node)
    _views_become_reshapes(out)


_STOPS = frozenset({"linear", "matmul", "addmm", "mm", "bmm", "conv2d", "einsum", "layer_norm", "embedding"})


def _views_become_reshapes(start: fx.Node) -> None:
    """A view that the old result's memory layout allowed need not be one of the new result's."""
    queue, seen = [start], {start}
    while queue:
        for user in queue.pop().users:
            if user in seen or user.op != "call_function" or op_name(user) in _STOPS:
                continue
            if user.target is aten.view.default:
                user.target = aten.reshape.default
            if len(seen) < 64:
                seen.add(user)
                queue.append(user)


def _erase(node: fx.Node) -> None:
    """A node that nothing reads, and what only led to it."""
    if not is_idle(node):
        return
    sources = node.all_input_nodes
    node.graph.erase_node(node)
    for source in sources:
        if not source._erased:
            _erase(source)
