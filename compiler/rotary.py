"""Rotary positions: pairs of channels of q and k turned by an angle that grows with the position (arXiv 2104.09864).

(x_c, x_{c + D/2}) -> rotated by  position * base^(-2c / D),   so that q_i . k_j depends on i - j alone
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotated(NamedTuple):
    """q and k turned, and what they were turned by: cos, sin (B | 1, N, D)."""

    q: Tensor
    k: Tensor
    cos: Tensor
    sin: Tensor


def rotated(q: Tensor, k: Tensor, positions: Tensor | None = None, base: float = 10000.0) -> Rotated:
    """q (B, H, N, D) and k (B, Hkv, N, D) of the same tokens; positions (N,) or (B, N), else 0, 1, ...

    >>> q, k = torch.ones(1, 1, 6, 4), torch.ones(1, 1, 6, 4)
    >>> scores = rotated(q, k).q @ rotated(q, k).k.mT
    >>> bool((scores[..., 1:, 1:] - scores[..., :-1, :-1]).abs().max() < 1e-5)   # the same along every diagonal
    True
    """
    dim = q.shape[-1]
    if positions is None:
        positions = torch.arange(q.shape[2], device=q.device)
    steps = base ** (-torch.arange(0, dim, 2, device=q.device, dtype=torch.float32) / dim)
    angles = positions.reshape(-1, q.shape[2], 1) * steps  # (B | 1, N, D / 2)
    cos, sin = (torch.cat((t, t), -1).to(q.dtype) for t in (angles.cos(), angles.sin()))
    return Rotated(_turned(q, cos, sin), _turned(k, cos, sin), cos, sin)


def _turned(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = t.chunk(2, -1)
    return t * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def turned(x: Tensor, places: Tensor, base: float) -> Tensor:
    """Rows x (..., E) at places of their own, which broadcast to (...), halves against each other."""
    half = x.shape[-1] // 2
    speed = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = places[..., None].to(torch.float64) * speed
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
