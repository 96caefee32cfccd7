"""Attention modules as people write them by hand: torch.nn's own, nanoGPT's, einsum, einops."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """torch.nn.MultiheadAttention on itself; asking for the weights makes it write attention out."""

    def __init__(self, dim: int = 32, heads: int = 4, *, weights: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x, need_weights=self.weights)[0]
        return out


class CausalBlock(nn.Module):
    """One fused projection, split; a lower-triangular buffer as the mask."""

    def __init__(self, dim: int, heads: int, longest: int, *, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.norm = nn.LayerNorm(dim)
        self.c_attn, self.c_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.bias: Tensor
        self.register_buffer("bias", torch.tril(torch.ones(longest, longest)).view(1, 1, longest, longest))

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.c_attn(self.norm(x)).split(C, dim=2)
        k = k.view(B, N, self.heads, C // self.heads).transpose(1, 2)
        q = q.view(B, N, self.heads, C // self.heads).transpose(1, 2)
        v = v.view(B, N, self.heads, C // self.heads).transpose(1, 2)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            scores = scores.masked_fill(self.bias[:, :, :N, :N] == 0, float("-inf"))
            y = F.softmax(scores, dim=-1) @ v
        return x + self.c_proj(y.transpose(1, 2).contiguous().view(B, N, C))


class NanoGPT(nn.Module):
    """Two causal blocks over hidden states."""

    def __init__(self, dim: int = 32, heads: int = 4, *, fused: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([CausalBlock(dim, heads, 16, fused=fused) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class EinsumAttention(nn.Module):
    """Heads as an axis of the projection's weight, everything an einsum."""

    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.w_q, self.w_k, self.w_v = (
            nn.Parameter(torch.randn(dim, heads, dim // heads) / dim**0.5) for _ in range(3)
        )
        self.w_o = nn.Parameter(torch.randn(heads, dim // heads, dim) / dim**0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bnc,chd->bnhd", x, w) for w in (self.w_q, self.w_k, self.w_v))
        weights = torch.einsum("bnhd,bmhd->bhnm", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)
        return torch.einsum("bnhd,hdc->bnc", torch.einsum("bhnm,bmhd->bnhd", weights, v), self.w_o)


class EinopsAttention(nn.Module):
    """Rearranged and multiplied by name."""

    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        from einops import einsum, rearrange

        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in self.to_qkv(x).chunk(3, dim=-1))
        dots = einsum(q, k, "b h i d, b h j d -> b h i j") * q.shape[-1] ** -0.5
        out = einsum(dots.softmax(dim=-1), v, "b h i j, b h j d -> b h i d")
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))
