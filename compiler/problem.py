"""Small deterministic problems: the tensors on which limits are stated, examples run and questions are asked."""

from __future__ import annotations

import torch
from torch import Tensor


def problem(
    n: int = 7,
    m: int | None = None,
    *,
    heads: int = 4,
    kv_heads: int | None = None,
    dim: int = 8,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q (B, H, N, D) and k, v (B, Hkv, M, D), always the same ones.

    >>> q, k, v = problem(5, kv_heads=2)
    >>> tuple(q.shape), tuple(k.shape)
    ((2, 4, 5, 8), (2, 2, 5, 8))
    """
    draw = torch.Generator().manual_seed(seed)
    keys = (batch, heads if kv_heads is None else kv_heads, n if m is None else m, dim)
    shapes = ((batch, heads, n, dim), keys, keys)
    q, k, v = (torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes)
    return q, k, v


def hidden(n: int = 7, *, width: int = 32, batch: int = 2, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """A normal hidden state x (B, N, C), always the same one."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn((batch, n, width), generator=draw, dtype=torch.float64).to(dtype)
