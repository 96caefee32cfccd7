"""`gather` and `scatter`: rows taken and rows sent back by number, -1 for none; each is the other's gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..refusal import Refused, nearest
from .operator import Groups, Primitive
from .row_index import check_index, check_rows, full_index, is_row, pick
from .spec import Spec

REDUCTIONS = ("add", "mean")


@dataclass(frozen=True)
class ScatterSpec(Spec):
    reduce: str = "add"


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, H, M, D) by number: index (R,), (B|1, R) or (B|1, H|1, R) gives (B, H, R, D), 0 for -1."""
    check_rows(x, "x", "gather")
    check_index(index, x, 1, "gather")
    return gather_op(x, index, Spec().text)[0]


def scatter(x: Tensor, index: Tensor, into: Tensor, *, reduce: str = "add") -> Tensor:
    """Rows of x (B, H, R, D) sent to the rows of `into` (B, H, M, D) that index (R,), (B|1, R), (B|1, H|1, R) names.

    reduce="add" adds all that arrive to `into`; "mean" puts their mean in its place, and leaves a row of `into` where
    none arrives. A row sent to -1 is dropped.
    """
    for t, what in ((x, "x"), (into, "into")):
        check_rows(t, what, "scatter")
    check_index(index, x, 1, "scatter")
    if reduce not in REDUCTIONS:
        raise Refused(f"reduce {reduce!r}", where="scatter", fits=nearest(reduce, REDUCTIONS))
    if x.shape[:2] != into.shape[:2] or x.shape[-1] != into.shape[-1] or index.shape[-1] != x.shape[2]:
        found = f"x {tuple(x.shape)}, index {tuple(index.shape)}, into {tuple(into.shape)}"
        raise Refused(found, where="scatter", fits="equal B, H, D, and as many numbers as rows of x")
    return scatter_op(x, index, into, ScatterSpec(reduce).text)[0]


def gather_meaning(groups: Groups, text: str) -> list[Tensor]:
    (x,), (index,) = groups
    return [pick(x, full_index(index, x, 1))]


def gather_shapes(groups: Groups, text: str) -> list[Tensor]:
    (x,), (index,) = groups
    return [x.new_empty(*x.shape[:2], index.shape[-1], x.shape[-1])]


def scatter_meaning(groups: Groups, text: str) -> list[Tensor]:
    (x,), (index,), (into,) = groups
    wide = torch.promote_types(into.dtype, torch.float32)
    numbers = full_index(index, x, 1)
    at = torch.where(is_row(numbers, into), numbers, into.shape[2])  # one row more takes what is dropped
    size = (*into.shape[:2], into.shape[2] + 1)
    arrived = torch.zeros(*size, into.shape[-1], dtype=wide, device=x.device)
    arrived = arrived.scatter_add(2, at.unsqueeze(-1).expand(x.shape), x.to(wide))[:, :, :-1]
    if ScatterSpec.of(text).reduce == "add":
        return [(into.to(wide) + arrived).to(into.dtype)]
    ones = torch.ones(at.shape, dtype=wide, device=x.device)
    count = torch.zeros(size, dtype=wide, device=x.device).scatter_add(2, at, ones)[:, :, :-1, None]
    return [torch.where(count > 0, arrived / count.clamp(min=1), into.to(wide)).to(into.dtype)]


def scatter_shapes(groups: Groups, text: str) -> list[Tensor]:
    return [torch.empty_like(groups[2][0], memory_format=torch.contiguous_format)]


gather_op = Primitive("gather", ("x", "index"), gather_meaning, gather_shapes)
scatter_op = Primitive("scatter", ("x", "index", "into"), scatter_meaning, scatter_shapes)
