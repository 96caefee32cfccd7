"""What the loss would change if entries of a map were removed, to first order, summed over blocks (MoA).

E_ij = P_ij (G_ij - sum_k G_ik P_ik) / (1 - P_ij),   G = dLoss/dO V^T:   removing ij and scaling the row up again
changes the loss by -E_ij; a row with a single key is removed whole, E = P G.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..primitives.rows import repeat_heads
from ..refusal import Refused
from .losses import Loss, loss_for
from .reading import Edit, Reading, Seen
from .rows import Rows, weight_rows

Batch = tuple[Sequence[Any], Mapping[str, Any]]


def block_influence(reading: Reading, batch: Batch, *, loss: Loss | None = None, block: int = 64) -> dict[str, Tensor]:
    """|E| summed over blocks of queries and keys, mean over samples: (H, N / block, M / block) for each site."""
    call, tensors = reading.call(*batch)
    if loss is None:
        with torch.no_grad():
            loss = loss_for(reading.edited(call, tensors, {}), call.values)
    found: dict[str, Tensor] = {}
    for seen, gradient in _with_gradients(reading, batch, loss):
        n, m = seen.q.shape[2], seen.k.shape[2]
        sums = torch.zeros(seen.q.shape[1], -(-n // block), -(-m // block), dtype=torch.float64)
        for rows, change in entry_influence(seen, gradient):
            _add_blocks(sums, change.abs().sum(0), rows, block)
        found[seen.site.path] = sums / seen.q.shape[0]
    return found


def entry_influence(seen: Seen, gradient: Tensor) -> Iterator[tuple[Rows, Tensor]]:
    """The change of the loss by removing each entry, rows at a time: (B, H, R, M)."""
    v = repeat_heads(seen.v, seen.q).float()
    for rows in weight_rows(seen):
        p, last = rows.weights, rows.first + rows.weights.shape[2]
        g = gradient[:, :, rows.first : last].to(p.dtype) @ v.to(p.dtype).mT
        centred = p * (g - (g * p).sum(-1, keepdim=True))
        removed = centred / (1 - p + torch.finfo(p.dtype).eps)
        alone = (p > 0).sum(-1, keepdim=True) == 1
        yield rows, -torch.where(alone, p * g, removed)


def loss_outside(blocks: Tensor, window: int, sinks: int = 1) -> Tensor:
    """(H,) what a window of so many blocks, the diagonal among them, and `sinks` first blocks would cost."""
    _, rows, columns = blocks.shape
    i, j = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    kept = ((i - j).abs() < window) | (j < sinks)
    return torch.where(kept, 0.0, blocks).sum((1, 2))


def _with_gradients(reading: Reading, batch: Batch, loss: Loss) -> Iterator[tuple[Seen, Tensor]]:
    """Every site with dLoss/dO: only tensors that grow with N are kept for it, no map."""
    call, tensors = reading.call(*batch)
    met: dict[str, tuple[Seen, Tensor]] = {}

    def watching(path: str) -> Edit:
        def edit(o: Tensor, arguments: Sequence[Any]) -> Tensor:
            probe = torch.zeros_like(o, requires_grad=True)
            met[path] = (reading.met(path, torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, arguments)), probe)
            return o + probe

        return edit

    with torch.enable_grad():
        output = reading.edited(call, tensors, {site.path: watching(site.path) for site in reading.sites})
        total = loss(output, call.values).sum()
        if not total.requires_grad:
            raise Refused("the loss does not depend on any site", where="heads", fits="a loss of the model's output")
        probes = [probe for _, probe in met.values()]
        gradients = torch.autograd.grad(total, probes, allow_unused=True)
    for (seen, probe), gradient in zip(met.values(), gradients, strict=True):
        yield seen, torch.zeros_like(probe) if gradient is None else gradient


def _add_blocks(sums: Tensor, values: Tensor, rows: Rows, block: int) -> None:
    """Add (H, R, M) to the blocks that its rows and columns lie in."""
    heads, count, m = values.shape
    columns = torch.zeros(heads, count, sums.shape[2], dtype=torch.float64)
    columns.index_add_(2, torch.arange(m) // block, values.double().cpu())
    sums.index_add_(1, (rows.first + torch.arange(count)) // block, columns)
