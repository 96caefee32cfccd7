"""A step by one number on a part of the scores is that step on all of them, chosen where the part lies."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..nodes import op_name
from .build import Builder, aten
from .layout import argument, tensor_of

_ALL = 2**62  # an end that is written as "to the end"
_STEPS = {"add": aten.add, "sub": aten.sub, "mul": aten.mul, "div": aten.div}


def views_of(node: Any) -> list[Any]:
    """A part of a tensor, and what it is a part of, the tensor itself last."""
    chain = [node]
    while op_name(chain[-1]) in ("slice", "select"):
        chain.append(chain[-1].args[0])
    return chain


def same_part(one: Any, other: Any) -> bool:
    """Whether two views are of one tensor and cut it in the same way."""
    left, right = views_of(one), views_of(other)
    cuts = [[(op_name(n), n.args[1:], n.kwargs) for n in chain[:-1]] for chain in (left, right)]
    return left[-1] is right[-1] and cuts[0] == cuts[1]


def step_on_part(node: fx.Node, chain: list[Any], builder: Builder) -> fx.Node | None:
    """The whole tensor after an in-place step on a part of it; None where the step is not by one number."""
    base, bounds = chain[-1], _bounds(chain)
    kind, number = _step(node)
    single = isinstance(number, int | float) or (tensor_of(number) is not None and tensor_of(number).ndim == 0)
    if not bounds or not single or node.kwargs:
        return None
    mask = _mask(base, bounds, builder)
    if kind == "fill":
        filled = aten.where.self if isinstance(number, fx.Node) else aten.where.ScalarSelf
        return builder.call(filled, mask, number, base)
    return builder.call(aten.where.self, mask, builder.call(_STEPS[kind].Tensor, base, number), base)


def _step(node: fx.Node) -> tuple[str, Any]:
    """What is done and by what: s[:2] += 1, s[:2] = 1, and s[:2] = s[:2] + 1."""
    kind, number = op_name(node).removesuffix("_"), argument(node, 1, "src")
    if kind == "zero":
        return "fill", 0.0
    if kind == "copy" and op_name(number) in _STEPS and not number.kwargs and same_part(number.args[0], node.args[0]):
        return op_name(number), number.args[1]
    if kind in ("fill", "copy"):
        return "fill", number
    return kind, number if kind in _STEPS else None


def _bounds(chain: list[Any]) -> dict[int, tuple[int, int]] | None:
    """First and last but one position along each dimension that is cut; None where a number is not known."""
    dims, found = list(range(tensor_of(chain[-1]).ndim)), {}
    for view in reversed(chain[:-1]):
        at = argument(view, 1, "dim", 0) % len(dims)
        start, end = argument(view, 2, "start" if op_name(view) == "slice" else "index") or 0, None
        if op_name(view) == "slice":
            end = argument(view, 3, "end")
            end = _ALL if end is None else end
        elif isinstance(start, int):
            end = start + 1 if start != -1 else _ALL
        if not isinstance(start, int) or not isinstance(end, int) or argument(view, 4, "step", 1) != 1:
            return None
        if (start, end >= _ALL) != (0, True):
            if dims[at] in found:
                return None
            found[dims[at]] = (start, end)
        if op_name(view) == "select":
            found.setdefault(dims[at], (start, end))
            dims.pop(at)
    return found


def _mask(base: fx.Node, bounds: dict[int, tuple[int, int]], builder: Builder) -> fx.Node:
    """True inside all bounds; it broadcasts against the base."""
    value, masks = tensor_of(base), []
    for dim, (start, end) in bounds.items():
        size = builder.shaped_size(value.shape[dim])
        places = builder.call(aten.arange.default, size, device=value.device)
        places = builder.call(aten.reshape.default, places, [-1, *[1] * (value.ndim - 1 - dim)])
        if start != 0:
            masks.append(builder.call(aten.ge.Scalar, places, _counted(start, size, builder)))
        if end < _ALL:
            masks.append(builder.call(aten.lt.Scalar, places, _counted(end, size, builder)))
    mask = masks[0]
    for other in masks[1:]:
        mask = builder.call(torch.ops.aten.bitwise_and.Tensor, mask, other)
    return mask


def _counted(place: int, size: int | fx.Node, builder: Builder) -> int | fx.Node:
    """A position counted from the end as one from the start."""
    if place >= 0:
        return place
    return size + place if isinstance(size, int) else builder.call(operator.add, size, place)
