"""A bias by where a key stands: a small network on the logarithms of the steps between two places (TransNeXt)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ...compiler.mechanism import Param
from ...compiler.primitives.rows import widened
from ...compiler.site import Grid
from ...compiler.starts import uniform

HIDDEN = 512
AT_ONCE = 2**18  # numbers inside the network that are held at once: a near cache has room for them


def network(heads: int) -> dict[str, Param]:
    """fc2(relu(fc1(.))) from two steps to a bias of each head; it starts at 0."""
    return {
        "fc1_weight": Param((HIDDEN, 2), uniform(2)),
        "fc1_bias": Param((HIDDEN,), uniform(2)),
        "fc2_weight": Param((heads, HIDDEN)),
        "fc2_bias": Param((heads,)),
    }


def bias_of_pooled(p: Any, grid: Grid, pooled: tuple[int, int], trained: tuple[int, int] | None) -> Tensor:
    """(H, h * w, P): every query against every pooled key, where the network sees each step once."""
    like = widened(p.fc1_weight)
    (y, at_y), (x, at_x) = (_steps(size, few, like) for size, few in zip((grid.h, grid.w), pooled, strict=True))
    found = _bias(p, trained or (grid.h, grid.w), y[:, None], x)  # (H, steps down, steps right)
    return found[:, at_y[:, None, :, None], at_x[None, :, None, :]].flatten(3, 4).flatten(1, 2)


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
    found = []
    for part in both.split(max(1, AT_ONCE // (both.shape[1] * HIDDEN))):
        inner = torch.relu(linear(part, widened(p.fc1_weight), widened(p.fc1_bias)))
        found.append(linear(inner, widened(p.fc2_weight), widened(p.fc2_bias)))
    return torch.cat(found).movedim(-1, 0)


def _steps(size: int, few: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The different steps from the middles of few cells to tokens 0 .. size - 1, and which of them (size, few)."""
    middles = [c * size // few - (-(c + 1) * size // few) - 1 for c in range(few)]  # twice the middle
    twice = [[2 * i - middle for middle in middles] for i in range(size)]
    order = {step: n for n, step in enumerate(sorted({step for row in twice for step in row}))}
    which = torch.tensor([[order[step] for step in row] for row in twice], device=like.device)
    return torch.tensor(list(order), dtype=like.dtype, device=like.device) / 2, which
