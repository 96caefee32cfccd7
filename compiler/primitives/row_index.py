"""Rows picked by number: an index map over the rows of (B, H, M, D), where a number outside 0 .. M - 1 is no row."""

from __future__ import annotations

import torch
from torch import Tensor

from ..refusal import Refused


def check_index(index: Tensor, x: Tensor, trailing: int, where: str) -> None:
    """An index is (..., T) with `trailing` dimensions T, before them nothing, (B|1) or (B|1, H|1)."""
    leading = index.ndim - trailing
    fits = f"{trailing} dimensions, or (B|1, H|1) before them, B={x.shape[0]} and H={x.shape[1]}"
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise Refused(f"an index of {index.dtype}", where=where, fits="whole numbers")
    if not 0 <= leading <= 2 or any(n not in (1, m) for n, m in zip(index.shape[:leading], x.shape, strict=False)):
        raise Refused(f"an index of shape {tuple(index.shape)}", where=where, fits=fits)


def check_rows(x: Tensor, what: str, where: str) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        found = f"{what} of shape {tuple(x.shape)} and {x.dtype}"
        raise Refused(found, where=where, fits="(B, H, N, D) of a floating type")


def full_index(index: Tensor, x: Tensor, trailing: int) -> Tensor:
    """The index as (B, H, *T)."""
    for _ in range(trailing + 2 - index.ndim):
        index = index.unsqueeze(index.ndim - trailing)
    return index.long().expand(*x.shape[:2], *index.shape[2:])


def by_row(flags: Tensor, x: Tensor) -> Tensor:
    """Flags of rows (N,), (B|1, N) or (B|1, H|1, N) as (B, H, N)."""
    return full_index(flags != 0, x, 1) != 0


def is_row(index: Tensor, x: Tensor) -> Tensor:
    return (index >= 0) & (index < x.shape[2])


def pick(x: Tensor, index: Tensor) -> Tensor:
    """x (B, H, M, D) at index (B, H, *T): (B, H, *T, D), 0 where there is no row."""
    with_none = torch.cat((x, x.new_zeros(*x.shape[:2], 1, x.shape[-1])), 2)
    return whole_rows(with_none, torch.where(is_row(index, x), index, x.shape[2]))


def whole_rows(x: Tensor, index: Tensor) -> Tensor:
    """The same where every number is that of a row, whole rows at once: a gather takes each number by itself."""
    batch, heads, count = x.shape[:3]
    first = torch.arange(0, batch * heads * count, count, device=x.device).view(batch, heads, 1)
    return x.flatten(0, 2).index_select(0, (index.flatten(2) + first).flatten()).view(*index.shape, x.shape[-1])
