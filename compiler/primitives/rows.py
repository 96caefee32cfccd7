"""Rows (B, H, N, D) as all primitives see them: key heads repeated for the query heads that share them."""

from __future__ import annotations

import torch
from torch import Tensor


def repeat_heads(t: Tensor, q: Tensor) -> Tensor:
    """(B|1, Hkv, M, D) as (B, H, M, D): consecutive query heads share a key head."""
    group = q.shape[1] // t.shape[1]
    t = t.expand(q.shape[0], *t.shape[1:])
    return t.repeat_interleave(group, 1) if group > 1 else t


def widened(t: Tensor) -> Tensor:
    """In float32 or better; untouched where it is: a cast would pin its type in a traced graph."""
    return as_type(t, torch.promote_types(t.dtype, torch.float32))


def as_type(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)
