"""A cascade run as it is written, in plain torch: what its loop nest, its kernel and its primitive are compared with.

A quotient by 0 is a quotient by 1, and elements that a predicate does not keep are not there: a row that keeps nothing
sums to 0, and its maximum is -inf.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..primitives.route import RouteSpec, route_meaning
from ..refusal import Refused
from ..symbol_eval import evaluate
from ..symbol_text import parse
from ..symbols import SIZE_NAMES, Expr
from .einsum import Cascade, Node

NEUTRAL = {"sum": 0.0, "max": -math.inf, "min": math.inf, "prod": 1.0}


@dataclass
class Values:
    """The tensors known so far, dimensions in the order of their ranks, and where a tile of a rank starts."""

    cascade: Cascade
    tensors: dict[str, Tensor]
    tables: Mapping[str, Tensor] = field(default_factory=dict)
    start: dict[str, int] = field(default_factory=dict)
    whole: dict[str, int] = field(default_factory=dict)  # the size of a rank that is cut into tiles
    given: Mapping[str, int] = field(default_factory=dict)  # sizes that no tensor here has to show

    def with_tensors(self, tensors: dict[str, Tensor]) -> Values:
        """The same place with other tensors."""
        return Values(self.cascade, tensors, self.tables, self.start, self.whole, {**self.given, **self.sizes})

    @property
    def sizes(self) -> dict[str, int]:
        found = dict(self.given)
        for name, tensor in self.tensors.items():
            for rank, size in zip(self.cascade.ranks.get(name, ()), tensor.shape):
                if found.setdefault(rank, size) != size:
                    raise Refused(f"rank {rank} of {size} in {name}", where="cascade", fits=f"{found[rank]}")
        return found


def run(cascade: Cascade, tensors: Mapping[str, Tensor], tables: Mapping[str, Tensor] = {}) -> dict[str, Tensor]:
    """The outputs by name."""
    values = Values(cascade, dict(tensors), tables)
    for node in cascade.needed(cascade.outputs):
        values.tensors[node.name] = compute(node, values)
    return {name: values.tensors[name] for name in cascade.outputs}


def compute(node: Node, values: Values) -> Tensor:
    """One node's tensor."""
    space = values.cascade.space(node)
    if node.kind == "scan":
        return scanned(node, values, None)[0]
    value = _kept(node, values, space)
    dims = [space.index(r) for r in node.over]
    if node.kind == "reduce":
        value = _reduced(value, node.monoid, dims)
    elif node.kind == "last":
        value = value.select(dims[0], 0 if node.reverse else -1).unsqueeze(dims[0])
    elif node.kind in ("global", "opaque"):
        return _global(node, value, dims, space)
    return _in_own_order(value, node.ranks, space)


def _kept(node: Node, values: Values, space: Sequence[str]) -> Tensor:
    value = in_space(node.expr, node, values, space)
    if not node.keep:
        return value
    fill = NEUTRAL.get(node.monoid, 0.0) if node.kind in ("reduce", "scan") else 0.0
    return torch.where(in_space(parse(node.keep), node, values, space) != 0, value, fill)


def _in_own_order(value: Tensor, ranks: Sequence[str], space: Sequence[str]) -> Tensor:
    """Without the dimensions that are no ranks of the result, which are of size 1, and in its order."""
    dropped = value[tuple(slice(None) if r in ranks else 0 for r in space)]
    kept = [r for r in space if r in ranks]
    return dropped.permute([kept.index(r) for r in ranks])


def in_space(expr: Expr, node: Node, values: Values, space: Sequence[str]) -> Tensor:
    """The values of an expression over all ranks of a space."""
    sizes = values.sizes
    names = {n: _name(n, node, values, space, sizes) for n in expr.names}
    found = torch.as_tensor(evaluate(_guarded(expr), names, values.tables))
    like = next((t for t in values.tensors.values() if t.is_floating_point()), None)
    if found.dtype != torch.bool and like is not None:
        found = found.to(like.dtype)
    return found.reshape((1,) * (len(space) - found.ndim) + tuple(found.shape)).expand([sizes[r] for r in space])


def _name(word: str, node: Node, values: Values, space: Sequence[str], sizes: Mapping[str, int]) -> Any:
    counted = {"b": "b", "h": "h", "i": node.at[0], "j": node.at[1]}
    if word in SIZE_NAMES:
        rank = node.at[word == "M"]
        return torch.tensor(values.whole.get(rank, sizes[rank]))
    if word not in counted:
        return aligned(values.tensors[word], values.cascade.ranks[word], space)
    rank = counted[word]
    if rank not in space:
        return torch.zeros((1,) * len(space), dtype=torch.long)
    return aligned(torch.arange(sizes[rank]) + values.start.get(rank, 0), (rank,), space)


def aligned(tensor: Tensor, ranks: Sequence[str], space: Sequence[str]) -> Tensor:
    """A tensor with a dimension for every rank of a space, of size 1 where it has none."""
    own = [r for r in space if r in ranks]
    turned = tensor.permute([list(ranks).index(r) for r in own])
    return turned[tuple(slice(None) if r in own else None for r in space)]


def _guarded(expr: Expr) -> Expr:
    """Every divisor of 0 as 1."""
    if not any(e.op == "truediv" for e in expr.walk()):
        return expr
    args = tuple(_guarded(a) if isinstance(a, Expr) else a for a in expr.args)
    if expr.op == "truediv" and args[1].op != "const":
        none = Expr("eq", (args[1], parse("0")))
        args = (args[0], Expr("where", (none, parse("1.0"), args[1])))
    return Expr(expr.op, args)


def _reduced(value: Tensor, monoid: str, dims: Sequence[int]) -> Tensor:
    for dim in dims:
        if monoid == "sum":
            value = value.sum(dim, keepdim=True)
        elif monoid == "prod":
            value = value.prod(dim, keepdim=True)
        else:
            edge = value.new_full([1 if d == dim else n for d, n in enumerate(value.shape)], NEUTRAL[monoid])
            joined = torch.cat((value, edge), dim)
            value = joined.amax(dim, keepdim=True) if monoid == "max" else joined.amin(dim, keepdim=True)
    return value


def scanned(node: Node, values: Values, carry: Tensor | None) -> tuple[Tensor, Tensor]:
    """Element by element along the rank, from `carry` where something came before: the results, and the end."""
    space = values.cascade.space(node)
    value, dim = _kept(node, values, space), space.index(node.over[0])
    decay = in_space(parse(node.decay), node, values, space) if node.decay else None
    without = [r for r in node.ranks if r != node.over[0]]
    one = [1 if d == dim else n for d, n in enumerate(value.shape)]
    state = value.new_full(one, NEUTRAL[node.monoid])
    if carry is not None:
        state = aligned(carry, without, space).expand(one)
    elif node.init:
        state = in_space(parse(node.init), node, values, space).narrow(dim, 0, 1).expand(one)
    found = []
    order = range(value.shape[dim])
    for at in reversed(order) if node.reverse else order:
        before, element = state, value.narrow(dim, at, 1)
        state = combine(node.monoid, state if decay is None else state * decay.narrow(dim, at, 1), element)
        found.append(before if node.before else state)
    rows = torch.cat(found[::-1] if node.reverse else found, dim)
    return _in_own_order(rows, node.ranks, space), _in_own_order(state, without, space)


def combine(monoid: str, a: Tensor, b: Tensor) -> Tensor:
    match monoid:
        case "sum":
            return a + b
        case "prod":
            return a * b
        case "max":
            return torch.maximum(a, b)
    return torch.minimum(a, b)


def _global(node: Node, value: Tensor, dims: Sequence[int], space: Sequence[str]) -> Tensor:
    """What needs a whole fiber at once: the k largest of it, as a mask over it."""
    kind, _, count = node.monoid.partition("_")
    if kind != "topk" or len(dims) != 1:
        raise Refused(f"operation {node.monoid!r}", where=str(node), fits="an analysis: it is not run")
    fiber = value.movedim(dims[0], -1)
    _, index = route_meaning([[fiber], []], RouteSpec(int(count or 1)).text)
    chosen = torch.zeros_like(fiber).scatter(-1, index.clamp(min=0), 1.0).movedim(-1, dims[0])
    return chosen.permute([[r for r in space if r in node.ranks].index(r) for r in node.ranks])
