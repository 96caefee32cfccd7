"""Constant tensors as formulas over their indices: checked on every element, so true for the whole extent."""

from __future__ import annotations

import torch

from ..symbols import TRUE, Expr, build, const

LARGEST = 1 << 26  # elements of a constant that is looked at


def constant_formula(tensor: torch.Tensor, index: tuple[Expr, ...]) -> Expr | None:
    """The element tensor[index] as an expression, or None."""
    if tensor.numel() == 0 or tensor.numel() > LARGEST or tensor.is_complex():
        return None
    first = tensor.flatten()[0]
    if bool((tensor == first).all()):
        return const(first.item())
    varying = [d for d in range(tensor.ndim) if not bool((tensor == tensor.narrow(d, 0, 1)).all())]
    core = tensor[tuple(slice(None) if d in varying else 0 for d in range(tensor.ndim))]
    picked = [index[d] for d in varying]
    if len(varying) == 1:
        return _progression(core, picked[0])
    return _triangle(core, picked[0], picked[1]) if len(varying) == 2 else None


def _progression(core: torch.Tensor, index: Expr) -> Expr | None:
    """first + step * index, in integers."""
    if core.dtype == torch.bool or core.is_floating_point():
        return None
    first, step = int(core[0]), int(core[1] - core[0])
    counted = torch.arange(core.numel(), device=core.device) * step + first
    return index * step + first if torch.equal(core, counted.to(core.dtype)) else None


def _triangle(core: torch.Tensor, row: Expr, column: Expr) -> Expr | None:
    """Two values, one of them exactly on a band low <= column - row <= high."""
    first = core[0, 0]
    other = core[core != first]
    if other.numel() == 0 or not bool((other == other[0]).all()):
        return None
    inside, outside = (first, other[0]) if bool(torch.isfinite(first)) else (other[0], first)
    for within, beyond in ((inside, outside), (outside, inside)):
        band = _band(core == within)
        if band is not None:
            return _pick(_between(row, column, *band), within, beyond)
    return None


def _band(mask: torch.Tensor) -> tuple[int | None, int | None] | None:
    """The range of column - row in which a mask is true, None for an end that the tensor does not reach."""
    rows, columns = mask.shape
    offsets = torch.arange(columns, device=mask.device)[None, :] - torch.arange(rows, device=mask.device)[:, None]
    low, high = int(offsets[mask].min()), int(offsets[mask].max())
    if not torch.equal(mask, (offsets >= low) & (offsets <= high)):
        return None
    return (None if low == 1 - rows else low), (None if high == columns - 1 else high)


def _between(row: Expr, column: Expr, low: int | None, high: int | None) -> Expr:
    condition = TRUE
    if low is not None:
        condition = condition & (column - row >= low)
    if high is not None:
        condition = condition & (column - row <= high)
    return condition


def _pick(condition: Expr, within: torch.Tensor, beyond: torch.Tensor) -> Expr:
    if within.dtype == torch.bool:
        return condition if bool(within) else ~condition
    return build("where", condition, const(within.item()), const(beyond.item()))
