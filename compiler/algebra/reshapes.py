"""Where channels stand after a reshape, a transpose, a slice, a concatenation: labels moved along."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, fx

from ..nodes import args_of, op_name
from .slots import Digit
from .spaces import Label, Spaces

Dims = tuple[Digit | None, ...]
_VIEWS = frozenset(["view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"])


def reshaped(node: fx.Node, labels: Mapping[fx.Node, Label], spaces: Spaces) -> dict[fx.Node, Label] | None:
    """Labels of the node (of its parts, where it gives several); None where its channels are not followed."""
    name = op_name(node)
    if name == "cat":
        return _joined(node, labels, spaces)
    if node.target is operator.getitem:
        return {}  # labelled with the split that it belongs to
    label = labels.get(args_of(node)[0])
    if label is None:
        return None
    if name in _VIEWS:
        dims = viewed(label.dims, _shape(node.args[0]), _shape(node))
    elif name in ("transpose", "permute", "movedim", "swapaxes", "t", "numpy_T"):
        dims = _turned(name, node.args, label.dims)
    elif name == "expand":
        dims = _expanded(label.dims, _shape(node.args[0]), _shape(node))
    elif name == "mean":
        dims = _reduced(node.args, label.dims)
    elif name in ("slice", "select"):
        return _cut(node, label, spaces, name)
    elif name in ("split", "split_with_sizes", "chunk", "unbind"):
        return _parts(node, label, spaces, name)
    else:
        return None
    return None if dims is None else {node: Label(label.space, dims)}


def viewed(dims: Dims, before: Sequence[Any], after: Sequence[Any]) -> Dims | None:
    """Factors after a reshape; dimensions are matched from the right, symbolic sizes by their text.

    >>> viewed((None, None, (1, 32)), (2, 7, 32), (2, 7, 4, 8))
    (None, None, (8, 4), (1, 8))
    >>> viewed((None, (8, 4), (1, 8)), (7, 4, 8), (7, 32))
    (None, (1, 32))
    """
    found: list[Digit | None] = [None] * len(after)
    right, left = len(after) - 1, len(before) - 1
    while left >= 0 and any(d is not None for d in dims[: left + 1]):
        if right < 0:
            return None
        if str(before[left]) == str(after[right]):
            found[right] = dims[left]
            left, right = left - 1, right - 1
        elif before[left] == 1 and dims[left] is None:
            left -= 1
        elif after[right] == 1:
            right -= 1
        elif not (isinstance(before[left], int) and isinstance(after[right], int)):
            return None
        elif before[left] > after[right]:  # one dimension becomes several
            rest, digit, inner = before[left], dims[left], 1
            while rest > 1:
                size = after[right] if right >= 0 else None
                if not isinstance(size, int) or rest % size:
                    return None
                found[right] = None if digit is None else (digit[0] * inner, size)
                rest, inner, right = rest // size, inner * size, right - 1
            left -= 1
        else:  # several become one
            rest, taken = after[right], []
            while rest > 1:
                size = before[left] if left >= 0 else None
                if not isinstance(size, int) or rest % size:
                    return None
                taken.append(dims[left])
                rest, left = rest // size, left - 1
            if (one := _run(taken[::-1])) is False:
                return None
            found[right] = one
            right -= 1
    return tuple(found)


def _run(digits: Sequence[Digit | None]) -> Any:
    """Neighbouring factors as one; False where they do not count through."""
    if all(d is None for d in digits):
        return None
    whole = [d for d in digits if d is not None]
    if len(whole) < len(digits) or any(outer[0] != inner[0] * inner[1] for outer, inner in pairwise(whole)):
        return False
    return whole[-1][0], math.prod([size for _, size in whole])


def _shape(node: Any) -> tuple[Any, ...]:
    value = node.meta["val"]
    return tuple(s if isinstance(s, int) else str(s) for s in value.shape)


def _turned(name: str, args: Sequence[Any], dims: Dims) -> Dims | None:
    rank = len(dims)
    order = list(range(rank))
    if name == "permute":
        order = [int(a) % rank for a in args[1]]
    elif name in ("transpose", "swapaxes"):
        one, other = (int(a) % rank for a in args[1:3])
        order[one], order[other] = order[other], order[one]
    elif name in ("t", "numpy_T"):
        order.reverse()
    else:
        return None
    return tuple(dims[a] for a in order)


def _expanded(dims: Dims, before: Sequence[Any], after: Sequence[Any]) -> Dims | None:
    new = len(after) - len(dims)
    full, sizes = (*[None] * new, *dims), (*[1] * new, *before)
    kept = all(d is None or str(s) == str(a) for d, s, a in zip(full, sizes, after, strict=True))
    return full if kept else None


def _reduced(args: Sequence[Any], dims: Dims) -> Dims | None:
    over = {int(a) % len(dims) for a in args[1]} if len(args) > 1 else set(range(len(dims)))
    if any(dims[a] is not None for a in over):
        return None
    keep = len(args) > 2 and bool(args[2])
    return dims if keep else tuple(d for a, d in enumerate(dims) if a not in over)


def _cut(node: fx.Node, label: Label, spaces: Spaces, name: str) -> dict[fx.Node, Label] | None:
    args: tuple[Any, ...] = (*node.args, *(0, None, None)[len(node.args) - 1 :])
    axis = int(args[1]) % len(label.dims)
    digit, left, right = label.dims[axis], label.dims[:axis], label.dims[axis + 1 :]
    if name == "select":
        if digit is None:
            return {node: Label(label.space, (*left, *right))}
        made = spaces.child(label.space, digit[0] * (int(args[2]) % digit[1]), (*left, *right))
        return None if made is None else {node: made}
    if digit is None:
        return {node: label}
    size, stepped = node.meta["val"].shape[axis], len(args) > 4 and args[4] != 1
    if size == digit[1]:
        return {node: label}
    start = int(args[2] or 0) % digit[1]
    made = None if stepped else spaces.child(label.space, digit[0] * start, (*left, (digit[0], int(size)), *right))
    return None if made is None else {node: made}


def _parts(node: fx.Node, label: Label, spaces: Spaces, name: str) -> dict[fx.Node, Label] | None:
    args: tuple[Any, ...] = node.args
    place = 1 if name == "unbind" else 2
    axis = int(args[place] if len(args) > place else 0) % len(label.dims)
    digit, left, right = label.dims[axis], label.dims[:axis], label.dims[axis + 1 :]
    start, found = 0, dict[fx.Node, Label]()
    for number, piece in enumerate(node.meta["val"]):
        size = 1 if name == "unbind" else piece.shape[axis]
        inner: Dims = () if name == "unbind" else (None if digit is None else (digit[0], int(size)),)
        dims = (*left, *inner, *right)
        made = Label(label.space, dims) if digit is None else spaces.child(label.space, digit[0] * start, dims)
        if made is None:
            return None
        found |= {user: made for user in node.users if user.target is operator.getitem and user.args[1] == number}
        start += size
    return found


def _joined(node: fx.Node, labels: Mapping[fx.Node, Label], spaces: Spaces) -> dict[fx.Node, Label] | None:
    """Laid beside one another along tokens: one space. What has no label must have no entries."""
    args: tuple[Any, ...] = node.args
    known = [labels[p] for p in args[0] if p in labels]
    axis = int(args[1] if len(args) > 1 else 0) % len(known[0].dims)
    blank = [p.meta["val"] for p in args[0] if p not in labels]
    if any(not isinstance(v, Tensor) or v.numel() != 0 for v in blank) or known[0].dims[axis] is not None:
        return None
    if any(other.dims != known[0].dims for other in known):
        return None
    for other in known[1:]:
        spaces.join(known[0].space, other.space)
    return {node: known[0]}
