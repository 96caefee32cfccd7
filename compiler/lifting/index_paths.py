"""Where an element comes from: index expressions carried backwards through operations that only move elements.

For a node and one index expression per axis, the same for its source: a transpose swaps them, a view regroups them,
a slice shifts them. What cannot be said is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..ports import op_name
from ..symbols import Expr, const

Index = tuple[Expr, ...]
ZERO = const(0)
SAME = frozenset({"to", "_to_copy", "clone", "contiguous", "alias", "detach", "type_as", "lift_fresh_copy", "float"})
MOVES = SAME | {
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "transpose", "permute", "t", "unsqueeze", "squeeze",
    "expand", "slice", "select", "swapaxes", "movedim", "matrix_T", "mT", "numpy_T",
}  # fmt: skip


def shape_of(node: Any) -> tuple[Any, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor):
        return ()
    if op_name(node) in ("view", "reshape") and len(node.args[1]) == value.ndim:
        return tuple(s if isinstance(s, int) and s >= 0 else size for s, size in zip(node.args[1], value.shape))
    return tuple(value.shape)


def same_size(a: Any, b: Any) -> bool:
    return _size(a) == _size(b)


def source_index(node: fx.Node, index: Index) -> Index | None:
    """The index into node.args[0] of the element that `index` names in node."""
    name, source = op_name(node), node.args[0]
    assert isinstance(source, fx.Node)
    if name in SAME:
        return index
    if name in ("view", "reshape", "_unsafe_view", "flatten", "unflatten"):
        return regroup(shape_of(source), shape_of(node), index)
    rank = len(shape_of(source))
    if name in ("transpose", "swapaxes"):
        a, b = (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
        moved = list(index)
        moved[a], moved[b] = moved[b], moved[a]
        return tuple(moved)
    if name in ("t", "mT", "matrix_T", "numpy_T"):
        return (*index[:-2], index[-1], index[-2]) if rank >= 2 and (name != "numpy_T" or rank == 2) else None
    if name == "permute":
        order = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr,arg-type]
        return tuple(index[order.index(axis)] for axis in range(rank))
    if name == "unsqueeze":
        axis = int(node.args[1]) % len(index)  # type: ignore[arg-type]
        return (*index[:axis], *index[axis + 1 :])
    if name == "squeeze":
        return regroup(shape_of(source), shape_of(node), index)
    if name == "expand":
        lead = len(index) - rank
        return tuple(ZERO if same_size(s, 1) else e for s, e in zip(shape_of(source), index[lead:]))
    if name == "slice":
        return _sliced(node, index, rank)
    if name == "select":
        axis, at = int(node.args[1]) % rank, node.args[2]  # type: ignore[arg-type]
        if not isinstance(at, int):
            return None
        size = shape_of(source)[axis]
        chosen = at if at >= 0 else (size + at if isinstance(size, int) else None)
        return None if chosen is None else (*index[:axis], const(chosen), *index[axis:])
    return None


def _sliced(node: fx.Node, index: Index, rank: int) -> Index | None:
    given = [*node.args[1:], *(None,) * 4][:4]
    axis, start, _, step = given[0] or 0, given[1] or 0, given[2], given[3] or 1
    size = shape_of(node.args[0])[int(axis) % rank]  # type: ignore[arg-type]
    if not isinstance(start, int) or not isinstance(step, int) or not isinstance(axis, int):
        return None
    if start < 0:
        if not isinstance(size, int):
            return None
        start = max(size + start, 0)
    axis %= rank
    return (*index[:axis], index[axis] * step + start, *index[axis + 1 :])


def regroup(source: Sequence[Any], target: Sequence[Any], index: Index) -> Index | None:
    """A view: axes are matched in the smallest groups of equal product, then split or joined in row-major order."""
    if source and target and same_size(source[-1], target[-1]):
        front = regroup(source[:-1], target[:-1], index[:-1])
        return None if front is None else (*front, index[-1])
    found: list[Expr] = []
    a = b = 0
    while a < len(source) or b < len(target):
        # what is left of both has equally many elements, also where sizes cannot tell
        wide, narrow = _next_group(source, target, a, b) or (len(source) - a, len(target) - b)
        inner = _through(source[a : a + wide], target[b : b + narrow], index[b : b + narrow])
        if inner is None:
            return None
        found += inner
        a, b = a + wide, b + narrow
    return tuple(found)


def _next_group(source: Sequence[Any], target: Sequence[Any], a: int, b: int) -> tuple[int, int] | None:
    left, right = len(source) - a, len(target) - b
    if left == 0:
        return (0, 1) if same_size(target[b], 1) else None
    if right == 0:
        return (1, 0) if same_size(source[a], 1) else None
    for total in range(2, left + right + 1):
        for wide in range(max(1, total - right), min(left, total - 1) + 1):
            if same_size(_product(source[a : a + wide]), _product(target[b : b + total - wide])):
                return wide, total - wide
    if same_size(source[a], 1):
        return 1, 0
    return (0, 1) if same_size(target[b], 1) else None


def _through(source: Sequence[Any], target: Sequence[Any], index: Index) -> list[Expr] | None:
    if len(source) == 1 and len(target) == 1:
        return list(index)
    flat: Expr = ZERO
    for size, part in zip(target, index):
        if not isinstance(size, int) and flat.text != "0":
            return None
        flat = joined(flat, size, part)
    if not source:
        return []
    found: list[Expr] = []
    for size in reversed(source[1:]):
        if same_size(size, 1):
            found.append(ZERO)
            continue
        if not isinstance(size, int):
            return None
        found.append(flat % size)
        flat = flat // size
    found.append(ZERO if same_size(source[0], 1) else flat)
    return found[::-1]


def joined(outer: Expr, size: Any, inner: Expr) -> Expr:
    """outer * size + inner; what // and % had split is whole again."""
    if outer.text == "0":
        return inner
    if inner.op == "mod" and inner.args[1].text == str(size) and outer.text == (inner.args[0] // size).text:
        return inner.args[0]
    return outer * size + inner


def _product(sizes: Sequence[Any]) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * _size(size)
    return total


def _size(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size
