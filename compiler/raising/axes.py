"""Tensor dimensions as products of named axes, so that any view or transpose is a regrouping of the same axes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy
from torch.utils._sympy.functions import FloorDiv

Size = Any  # an int, or the sympy expression of a symbolic size


@dataclass(eq=False)
class Axis:
    """One axis; a view that takes it apart gives it parts, outermost first."""

    size: Size
    parts: tuple[Axis, ...] = ()


Group = tuple[Axis, ...]  # one dimension of a tensor, outermost axis first; a dimension of size 1 has none
Groups = tuple[Group, ...]


def extent(size: Any) -> Size:
    """A size as an int or an expression."""
    if isinstance(size, int):
        return size
    expression = _divided(size.node.expr if hasattr(size, "node") else size)
    return int(expression) if expression.is_Integer else expression


@lru_cache(maxsize=4096)
def _divided(expression: Any) -> Any:
    """Divisions of sizes taken as exact: what a view cuts in pieces has pieces of one size."""
    if not expression.has(FloorDiv):
        return expression
    return expression.replace(lambda e: isinstance(e, FloorDiv), lambda e: e.args[0] / e.args[1])


def extents(tensor: Any) -> tuple[Size, ...]:
    return tuple(extent(s) for s in tensor.shape)


def fresh(size: Any) -> Group:
    """A new axis of that size; none for size 1."""
    size = extent(size)
    return () if size == 1 else (Axis(size),)


def cut(group: Group, size: Size) -> Group:
    """What a tensor of this size has of a group that it broadcasts to."""
    return group if size != 1 or product(group) == 1 else ()


def fresh_groups(tensor: Any) -> Groups:
    return tuple(fresh(s) for s in tensor.shape)


def aligned(tensor: Any, groups: Groups) -> Groups:
    """The axes of a tensor that broadcasts against one of these axes."""
    shape = extents(tensor)
    return tuple(cut(group, size) for group, size in zip(groups[len(groups) - len(shape) :], shape))


def leaves(group: Group) -> Group:
    """The axes of a group, those that were taken apart replaced by their parts."""
    found: list[Axis] = []
    for axis in group:
        found.extend(leaves(axis.parts) if axis.parts else (axis,))
    return tuple(found)


def all_leaves(groups: Groups) -> Group:
    return tuple(axis for group in groups for axis in leaves(group))


def product(group: Group) -> Size:
    total: Size = 1
    for axis in leaves(group):
        total = total * axis.size
    return extent(total) if not isinstance(total, int) else total


def same(one: Groups, other: Groups) -> bool:
    return len(one) == len(other) and all(leaves(a) == leaves(b) for a, b in zip(one, other))


def regroup(groups: Groups, shape: tuple[Size, ...]) -> Groups | None:
    """The same axes in the dimensions of another shape, as a view orders them; None where the two do not factor."""
    pending = list(all_leaves(groups))
    out: list[Group] = []
    for size in shape:
        dim: list[Axis] = [pending.pop(0)] if size == 1 and pending and pending[0].size == 1 else []
        rest = size
        while rest != 1:
            if not pending:
                return None
            axis = pending.pop(0)
            whole, part = quotient(rest, axis.size), quotient(axis.size, rest)
            if whole is not None:
                dim.append(axis)
                rest = whole
            elif part is not None:
                axis.parts = (Axis(rest), Axis(part))
                dim.append(axis.parts[0])
                pending.insert(0, axis.parts[1])
                rest = 1
            else:
                return None
        out.append(tuple(dim))
    if out and all(axis.size == 1 for axis in pending):
        out[-1] = (*out[-1], *pending)
        return tuple(out)
    return None if pending else tuple(out)


def quotient(size: Size, divisor: Size) -> Size | None:
    """size / divisor where that is whole for all values of the symbols, else None."""
    if size == divisor:
        return 1
    if isinstance(size, int) and isinstance(divisor, int):
        return size // divisor if divisor and size % divisor == 0 else None
    return _symbolic_quotient(size, divisor)


@lru_cache(maxsize=4096)
def _symbolic_quotient(size: Size, divisor: Size) -> Size | None:
    numerator, denominator = sympy.fraction(sympy.cancel(sympy.sympify(size) / divisor))
    return extent(numerator) if denominator == 1 and numerator != 0 else None
