"""Numbers of one row of weights, averaged over rows: how spread, how far, how much on the first key, which copies.

Each is a function of a chunk of rows that gives (B, H, R), nan for rows in which it is not defined.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..site import Grid
from .rows import Rows

PerRow = Callable[[Rows], Tensor]


@dataclass
class Mean:
    """A running mean over real rows of everything that comes, for each head."""

    total: Tensor | None = None  # (H,) float64
    count: Tensor | None = None

    def add(self, values: Tensor, real: Tensor) -> None:
        counted = real.unsqueeze(1) & ~values.isnan()  # (B, H, R)
        total = torch.where(counted, values, 0.0).double().sum((0, 2))
        count = counted.double().sum((0, 2))
        self.total = total if self.total is None else self.total + total
        self.count = count if self.count is None else self.count + count

    def value(self) -> Tensor:
        """(H,) float64; nan where no row counted."""
        assert self.total is not None and self.count is not None
        return torch.where(self.count > 0, self.total / self.count.clamp(min=1), math.nan)


def entropy(rows: Rows) -> Tensor:
    """-sum_j w_ij log w_ij, in nats."""
    w = rows.weights
    return -torch.where(w > 0, w * torch.log(torch.where(w > 0, w, 1.0)), 0.0).sum(-1)


def sink(rows: Rows) -> Tensor:
    """The weight of the first key: the first token, or the class token."""
    return rows.weights[..., 0]


def distance(rows: Rows) -> Tensor:
    """sum_j w_ij |i - j| in tokens; on a grid in patches, among patches alone."""
    site = rows.seen.site
    if not site.self_attention:
        return torch.full_like(rows.weights[..., 0], math.nan)
    if site.grid is not None and not site.causal:
        return _on_grid(rows, site.grid)
    away = (rows.i[:, None] - rows.j[None, :]).abs().to(rows.weights.dtype)
    return (rows.weights * away).sum(-1)


def _on_grid(rows: Rows, grid: Grid) -> Tensor:
    weights = rows.weights[..., grid.prefix :]
    (yi, xi), (yj, xj) = (
        (p // grid.w, p % grid.w) for p in (rows.i - grid.prefix, rows.j[grid.prefix :] - grid.prefix)
    )
    away = torch.hypot((yi[:, None] - yj).to(weights.dtype), (xi[:, None] - xj).to(weights.dtype))
    total = weights.sum(-1)
    mean = (weights * away).sum(-1) / total.clamp(min=torch.finfo(weights.dtype).tiny)
    return mean.masked_fill((rows.i < grid.prefix).expand(mean.shape) | (total == 0), math.nan)


ROW_MEASURES: Mapping[str, PerRow] = {"entropy": entropy, "sink": sink, "distance": distance}


def echo(block: int) -> PerRow:
    """Weight on all earlier copies of the query's own token, where one block of `block` tokens comes again and again.

    The card averages over all S x S entries; here a row's copies are summed and rows behind the first block averaged:
    the same order of heads, and 1 is a head that does nothing else.
    """
    return lambda rows: _on_copies(rows, block, lambda i, j: ((i - j) % block == 0) & (j < i))


def induction(block: int) -> PerRow:
    """Weight on the tokens that stood behind earlier copies of the query's own token."""
    return lambda rows: _on_copies(rows, block, lambda i, j: ((i + 1 - j) % block == 0) & (j <= i) & (j > 0))


def _on_copies(rows: Rows, block: int, wanted: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    chosen = wanted(rows.i[:, None], rows.j[None, :])
    mass = torch.where(chosen, rows.weights, 0.0).sum(-1)
    return mass.masked_fill((rows.i < block).expand(mass.shape), math.nan)


def retrieval(sources: Iterable[tuple[int, int, int]]) -> PerRow:
    """1 where the largest weight of a row lies on its source: (sample, row, source) each; other rows do not count."""
    given = list(sources)

    def hits(rows: Rows) -> Tensor:
        found = torch.full_like(rows.weights[..., 0], math.nan)
        last = rows.first + rows.weights.shape[2]
        for sample, row, source in given:
            if rows.first <= row < last:
                best = rows.weights[sample, :, row - rows.first].argmax(-1)
                found[sample, :, row - rows.first] = (best == source).to(found.dtype)
        return found

    return hits
