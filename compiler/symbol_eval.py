"""Expressions on tensors: the plain meaning of a predicate or a score, and what every kernel is compared with."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .refusal import Refused
from .symbols import FUNCTIONS, INDEX_NAMES, Expr

Value = Any  # a tensor or a Python number
_OPERATORS: dict[str, Callable[[Value, Value], Value]] = {
    "add": operator.add,
    "mul": operator.mul,
    "truediv": operator.truediv,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "pow": operator.pow,
    "le": operator.le,
    "lt": operator.lt,
    "eq": operator.eq,
    "ne": operator.ne,
}


def evaluate(
    e: Expr, names: Mapping[str, Value], tables: Mapping[str, Tensor], *, whole: frozenset[str] = frozenset()
) -> Value:
    """The value of an expression; names hold tensors that broadcast over (B, H, N, M), those in `whole` count 0, 1, ...

    >>> from .symbol_text import parse
    >>> i, j = torch.arange(3).view(3, 1), torch.arange(3).view(1, 3)
    >>> evaluate(parse("j <= i"), {"i": i, "j": j}, {}).int()
    tensor([[1, 0, 0],
            [1, 1, 0],
            [1, 1, 1]], dtype=torch.int32)
    """
    return _Reading(names, tables, whole).value(e)


@dataclass(frozen=True)
class _Reading:
    """One reading of an expression: what it names, and the parts that are known. No closures that call each other: they
    would keep every part, as large as the scores, until Python next looks for cycles."""

    names: Mapping[str, Value]
    tables: Mapping[str, Tensor]
    whole: frozenset[str]
    done: dict[int, Value] = field(default_factory=dict)

    def value(self, x: Expr) -> Value:
        if id(x) not in self.done:
            self.done[id(x)] = self._computed(x)
        return self.done[id(x)]

    def _computed(self, x: Expr) -> Value:
        if x.op == "const":
            return x.args[0]
        if x.op == "name":
            if x.args[0] not in self.names:
                raise Refused(f"`{x.args[0]}` is not known here", fits=f"known: {', '.join(self.names)}")
            return self.names[x.args[0]]
        if x.op == "lookup":
            at = [self.value(a) for a in x.args[1:]]
            return lookup(self.tables[x.args[0]], x.args[1:], at, self.names, self.whole)
        parts = [self.value(a) for a in x.args]
        if x.op in ("and", "or", "not"):
            truths = [_truth(p) for p in parts]
            if x.op == "not":
                return ~truths[0]
            total = truths[0]
            for truth in truths[1:]:
                total = total & truth if x.op == "and" else total | truth
            return total
        if x.op in _OPERATORS:
            total = parts[0]
            for part in parts[1:]:
                total = _OPERATORS[x.op](total, part)
            return total
        return _call(x.op, parts)


def _truth(value: Value) -> Value:
    if isinstance(value, Tensor):
        return value if value.dtype == torch.bool else value != 0
    return torch.tensor(bool(value))


def _call(function: str, parts: Sequence[Value]) -> Value:
    if not any(isinstance(p, Tensor) for p in parts):  # of sizes alone
        parts = [torch.full((), p, dtype=torch.float64) for p in parts]
    like = next(p for p in parts if isinstance(p, Tensor))
    if len(parts) > 1:  # a number takes the type of the tensor beside it, and is not rounded before
        kind = torch.result_type(parts[-2], parts[-1])
        pair = [torch.as_tensor(p, dtype=kind, device=like.device) for p in parts[-2:]]
        if function == "where":
            return torch.where(_truth(parts[0]).to(like.device), *pair)
        return FUNCTIONS[function](*pair)
    return FUNCTIONS[function](like if like.is_floating_point() or function == "abs" else like.float())


def lookup(
    table: Tensor, index: Sequence[Expr], values: Sequence[Value], names: Mapping[str, Value], whole: frozenset[str]
) -> Tensor:
    """table[index...], indices clamped; whole axes in their own order are a view, not a gather."""
    axes = [INDEX_NAMES.index(e.args[0]) if e.op == "name" and e.args[0] in whole else -1 for e in index]
    order = [axis for axis in axes if axis >= 0]
    straight = order == sorted(set(order)) and all(
        names[INDEX_NAMES[axis]].numel() == size if axis >= 0 else e.op == "const"
        for axis, e, size in zip(axes, index, table.shape, strict=True)
    )
    if straight:
        picked = table[tuple(slice(None) if a >= 0 else int(e.args[0]) for a, e in zip(axes, index, strict=True))]
        return picked[tuple(slice(None) if a in order else None for a in range(len(INDEX_NAMES)))]
    clamped = []
    for value, size in zip(values, table.shape, strict=True):
        where = value if isinstance(value, Tensor) else torch.tensor(value, device=table.device)
        clamped.append(where.long().clamp(0, max(size - 1, 0)))
    return table[tuple(clamped)]
