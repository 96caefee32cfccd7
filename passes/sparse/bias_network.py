"""A bias by where a key stands: a small network on the logarithms of the steps between two places (TransNeXt)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, linear

from ...compiler.mechanism import Param
from ...compiler.primitives.rows import widened
from ...compiler.site import Grid
from ...compiler.starts import uniform

HIDDEN = 512


def network(heads: int) -> dict[str, Param]:
    """fc2(relu(fc1(.))) from two steps to a bias of each head; it starts at 0."""
    return {
        "fc1_weight": Param((HIDDEN, 2), uniform(2)),
        "fc1_bias": Param((HIDDEN,), uniform(2)),
        "fc2_weight": Param((heads, HIDDEN)),
        "fc2_bias": Param((heads,)),
    }


def bias_of_pooled(p: Any, grid: Grid, pooled: tuple[int, int], trained: tuple[int, int] | None) -> Tensor:
    """(H, h * w, P): every query against every pooled key, which stands in the middle of its cell."""
    steps = []
    for size, few in zip((grid.h, grid.w), pooled, strict=True):
        place = torch.arange(size, device=p.fc1_weight.device, dtype=widened(p.fc1_weight).dtype)
        steps.append(place[:, None] - adaptive_avg_pool1d(place[None], few)[0])
    y, x = steps[0][:, None, :, None], steps[1][None, :, None, :]
    return _bias(p, trained or (grid.h, grid.w), y, x).flatten(3, 4).flatten(1, 2)


def bias_of_steps(p: Any, grid: Grid, trained: tuple[int, int] | None) -> Tensor:
    """(H, 2 h - 1, 2 w - 1): every step between two tokens of the grid."""
    like = widened(p.fc1_weight)
    y, x = (torch.arange(1 - n, n, device=like.device, dtype=like.dtype) for n in (grid.h, grid.w))
    return _bias(p, trained or (grid.h, grid.w), y[:, None], x)


def _bias(p: Any, trained: tuple[int, int], y: Tensor, x: Tensor) -> Tensor:
    """Steps count as eighths of the grid that the network was trained on."""
    far = [t / max(side - 1, 1) * 8 for t, side in zip((y, x), trained, strict=True)]
    logs = [t.sign() * torch.log2(t.abs() + 1) / 3 for t in far]
    both = torch.stack(torch.broadcast_tensors(*logs), -1)
    inner = torch.relu(linear(both, widened(p.fc1_weight), widened(p.fc1_bias)))
    return linear(inner, widened(p.fc2_weight), widened(p.fc2_bias)).movedim(-1, 0)
