"""ARank: the mean numerical rank of a head's map without its diagonal; low means redundant (γ-MoD)."""

from __future__ import annotations

import torch
from torch import Tensor

from .reading import Seen
from .rows import BUDGET, weight_rows


def arank(seen: Seen, budget: int = BUDGET) -> Tensor:
    """(B, H) ranks. Of a causal site the strict lower triangle counts, of any other the whole map.

    A map is held whole, some maps at a time: where they are more than the budget allows, the rows are made again.
    """
    batch, heads, n, _ = seen.q.shape
    m = seen.k.shape[2]
    found = torch.zeros(batch * heads, dtype=torch.float64)
    at_once = max(1, budget // max(1, n * m))
    for first in range(0, batch * heads, at_once):
        some = slice(first, min(first + at_once, batch * heads))
        found[some] = torch.linalg.matrix_rank(_maps(seen, some, budget)).double().cpu()
    return found.view(batch, heads)


def _maps(seen: Seen, some: slice, budget: int) -> Tensor:
    parts = []
    for rows in weight_rows(seen, budget):
        weights = rows.weights.flatten(0, 1)[some].float()
        if seen.site.causal:
            weights = torch.where(rows.j[None, :] < rows.i[:, None], weights, 0.0)
        parts.append(weights)
    return torch.cat(parts, 1)
