"""The weights of one site a few rows at a time: the whole N x M is never held."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..primitives.attend_meaning import attend_meaning
from ..symbol_text import parse
from .reading import Seen

BUDGET = 1 << 22  # weights at once, over batch and heads: 16 MB


@dataclass(frozen=True)
class Rows:
    """Some consecutive queries and all their keys."""

    seen: Seen
    first: int
    weights: Tensor  # (B, H, R, M), float32 or wider
    i: Tensor  # (R,) positions of the queries
    j: Tensor  # (M,) positions of the keys
    real: Tensor  # (B, R) queries that are no padding


@torch.no_grad()
def weight_rows(seen: Seen, budget: int = BUDGET) -> Iterator[Rows]:
    """All rows of a site, as many at a time as the budget allows."""
    batch, heads, n, _ = seen.q.shape
    m = seen.k.shape[2]
    size = max(1, budget // max(1, batch * heads * m)) if _separable(seen) else n
    real = seen.real()
    j = torch.arange(m, device=seen.q.device)
    for first in range(0, n, size):
        last = min(first + size, n)
        i = torch.arange(first, last, device=seen.q.device) + seen.offset
        yield Rows(seen, first, _weights(seen, first, last, i), i, j, real[:, first:last])


def _weights(seen: Seen, first: int, last: int, i: Tensor) -> Tensor:
    """The rows as a site of their own whose queries know where they stand."""
    spec, tables = replace(seen.spec, outputs=("weights",)), seen.tables
    if last - first < seen.q.shape[2]:
        if spec.q_positions:
            number = int(spec.q_positions[1:])
            own = tables[number][..., first:last]
            tables = (*tables[:number], own, *tables[number + 1 :])
        else:
            spec, tables = replace(spec, align="start", q_positions=f"t{len(tables)}"), (*tables, i)
    (weights,) = attend_meaning([[seen.q[:, :, first:last]], [seen.k, seen.v], tables], spec.text)
    return weights


def _separable(seen: Seen) -> bool:
    """Whether a row depends on its own query alone, and the text does not count the queries."""
    spec = seen.spec
    texts = (spec.keep, spec.score, spec.weight, spec.sink, spec.after, spec.empty)
    return not (spec.rows or spec.tiles or spec.leader) and all("N" not in parse(t).names for t in texts if t)
