"""Small models that tests share: attention blocks written with plain torch, sizes that differ from one another."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attend(nn.Module):
    """Grouped-query self-attention over torch's own fused op."""

    def __init__(self, dim: int = 32, heads: int = 4, kv_heads: int = 2, *, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size, self.causal = heads, kv_heads, dim // heads, causal
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, kv_heads * self.size)
        self.v_proj = nn.Linear(dim, kv_heads * self.size)
        self.o_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q = self.q_proj(x).view(B, N, self.heads, self.size).transpose(1, 2)
        k = self.k_proj(x).view(B, N, self.kv_heads, self.size).transpose(1, 2)
        v = self.v_proj(x).view(B, N, self.kv_heads, self.size).transpose(1, 2)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=self.heads != self.kv_heads)
        return self.o_proj(o.transpose(1, 2).reshape(B, N, C))


class Block(nn.Module):
    def __init__(self, dim: int = 32, heads: int = 4, kv_heads: int = 2, *, causal: bool = True) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attend(dim, heads, kv_heads, causal=causal)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Stack(nn.Module):
    """Blocks over hidden states (B, N, C)."""

    def __init__(self, layers: int = 3, *, causal: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(causal=causal) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def stack(layers: int = 3, *, causal: bool = True) -> Stack:
    torch.manual_seed(0)
    return Stack(layers, causal=causal).eval()


class Words(nn.Module):
    """A tiny language model: its outputs by name, a loss where labels are given."""

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(60, 32), stack(1), nn.Linear(32, 60)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        logits = self.head(self.dropout(self.body(self.embedding(input_ids))))
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), "logits": logits}


def words(**how: float) -> Any:
    torch.manual_seed(0)
    model = Words(**how)
    with torch.no_grad():
        for weight in model.body.parameters():
            weight.mul_(4 if weight.ndim == 2 else 1)  # attention that looks somewhere
    return model.eval()


def decided_llama(hidden: int) -> Any:
    """A tiny Hugging Face llama far enough from uniform that what is seen decides the token."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model
