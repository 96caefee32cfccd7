"""The gate that SeerAttention learns: blocks pooled to a row each, rotated to a place, and what teaches it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...compiler.primitives.group import group

HIDDEN = -1e9  # the gate's score of a block that lies ahead


def pools(names: str) -> tuple[str, ...]:
    """max, min and avg written together, in this order; nothing else."""
    found = tuple(name for name in ("max", "min", "avg") if name in names)
    return found if "".join(found) == names else ()


def pooled(x: Tensor, numbers: Tensor, real: Tensor | None, names: str) -> tuple[Tensor, Tensor]:
    """Each block as one row (B, H, G, D * pools), over the tokens that are there; and which blocks hold any."""
    rows, slots = group(x, numbers, valid=real)
    held = slots.any(-1)
    parts = {
        "max": lambda: rows.masked_fill(~slots[..., None], -math.inf).amax(-2),
        "min": lambda: rows.masked_fill(~slots[..., None], math.inf).amin(-2),
        "avg": lambda: rows.sum(-2) / slots.sum(-1, keepdim=True).clamp(min=1),
    }
    pooled = torch.cat([parts[name]() for name in pools(names)], -1)
    return torch.where(held[..., None], pooled, 0.0), held


def divergence(scores: Tensor, target: Tensor, first: int) -> Tensor:
    """KL(target, softmax of the scores), the mean over all entries of the rows from one on."""
    scores, target = scores[..., first:, :], target[..., first:, :].to(scores.dtype)
    return (torch.xlogy(target, target) - target * torch.log_softmax(scores, -1)).mean()
