"""Attention written by hand in many ways: the forms, and what each of them must be read as."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

B, H, N, M, D, E = 2, 4, 6, 9, 8, 5
SCALE = D**-0.5


@dataclass(frozen=True)
class Spelling:
    """One way to write attention; q (B, H, N, D), k (B, H, M, D), v (B, H, M, E) unless inputs says otherwise."""

    name: str
    run: Callable[..., Any]
    score: str = f"s * {SCALE!r}"
    keep: str = ""
    after: str = ""
    sink: str = ""
    inputs: Callable[[], tuple[Tensor, ...]] | None = None
    kv_heads: int = H
    heads: int = H


class Written(nn.Module):
    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, q: Tensor, k: Tensor, v: Tensor, m: Tensor | None = None) -> Any:
        return self.run(q, k, v) if m is None else self.run(q, k, v, m)


def qkv() -> tuple[Tensor, ...]:
    return torch.randn(B, H, N, D), torch.randn(B, H, M, D), torch.randn(B, H, M, E)


def square() -> tuple[Tensor, ...]:
    return torch.randn(B, H, N, D), torch.randn(B, H, N, D), torch.randn(B, H, N, E)


def grouped() -> tuple[Tensor, ...]:
    return torch.randn(B, H, N, D), torch.randn(B, 2, M, D), torch.randn(B, 2, M, E)


def with_mask(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    def make() -> tuple[Tensor, ...]:
        mask = torch.rand(shape) < 0.7
        mask[..., 0] = True
        return (*qkv(), mask)

    return make


def with_bias(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (*qkv(), torch.randn(shape))


def flat() -> tuple[Tensor, ...]:
    return torch.randn(B * H, N, D), torch.randn(B * H, M, D), torch.randn(B * H, M, E)


def batch_of_eight() -> tuple[Tensor, ...]:
    return torch.randn(8, H, N, D), torch.randn(8, H, M, D), torch.randn(8, H, M, E)


def single() -> tuple[Tensor, ...]:
    return torch.randn(N, D), torch.randn(M, D), torch.randn(M, E)


def tokens_first() -> tuple[Tensor, ...]:
    return torch.randn(B, N, H, D), torch.randn(B, M, H, D), torch.randn(B, M, H, E)


def soft(s: Tensor) -> Tensor:
    return s.softmax(-1)


def stable(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.transpose(-1, -2) * SCALE
    e = torch.exp(s - s.max(dim=-1, keepdim=True).values)
    return (e / e.sum(-1, keepdim=True)) @ v


def stable_in_a_smaller_range(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT * SCALE / 32
    return ((s - s.amax(-1)[..., None]) * 32).softmax(-1) @ v


def unnormalised_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = torch.exp((q @ k.mT) * SCALE)
    return torch.einsum("bhij,bhje->bhie", e * e.sum(-1, keepdim=True).reciprocal(), v)


def clamped_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT * SCALE
    e = (s - s.amax(-1, keepdim=True).detach()).exp()
    return e / e.sum(-1, keepdim=True).clamp(min=1e-6) @ v


def masked_exponentials(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    e = torch.exp(q @ k.mT * SCALE).masked_fill(~m, 0.0)
    return e / e.sum(-1, keepdim=True) @ v


def multiplied_exponentials(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    e = torch.exp(q @ k.mT * SCALE) * m.float()
    return e / e.sum(-1, keepdim=True) @ v


def divided_behind(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT * SCALE
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return (e @ v) / e.sum(-1, keepdim=True)


def divided_behind_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = torch.exp(q @ k.mT * SCALE)
    return torch.einsum("bhij,bhje->bhie", e, v) / e.sum(-1).unsqueeze(-1)


def powers_of_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = torch.exp2(q @ k.mT)
    return e / e.sum(-1, keepdim=True) @ v


def relative_first(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    """Position vectors multiplied with the queries, added in front of the product with the keys."""
    return soft((torch.einsum("bhid,ijd->bhij", q, m) + q @ k.mT) * SCALE) @ v


def two_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two halves of the features under two scales."""
    s = q[..., :4] @ k[..., :4].mT + 2.0 * (q[..., 4:] @ k[..., 4:].mT)
    return soft(s) @ v


def log_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT * SCALE
    return torch.exp(s - torch.logsumexp(s, -1, keepdim=True)) @ v


def tril(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT / math.sqrt(D)
    mask = torch.tril(torch.ones(s.shape[-2:], dtype=torch.bool))
    return soft(s.masked_fill(~mask, float("-inf"))) @ v


def triu_added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT * SCALE
    return soft(s + torch.full(s.shape[-2:], float("-inf")).triu(1)) @ v


def softcap(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    s = torch.tanh(q @ k.mT * SCALE / 5.0) * 5.0
    return soft(torch.where(m, s, torch.finfo(s.dtype).min)) @ v


def inplace(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    s = q @ k.mT
    s *= SCALE
    s += m
    return s.softmax(-1) @ v


def inplace_fill(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    s = q @ k.mT
    s.mul_(SCALE).masked_fill_(~m, -1e9)
    return s.softmax(-1) @ v


def sliced_copy(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    s = q @ k.mT * SCALE
    s[:, :, 0:, 0:] = s[:, :, 0:, 0:].view(B, H, 2, 3, 3, 3).add(m[..., None]).view(B, H, N, M)
    return s.softmax(-1) @ v


def sinks_last(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    s = torch.cat([q @ k.mT * SCALE, m.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)], -1)
    s = s - s.max(dim=-1, keepdim=True).values
    return F.softmax(s, dim=-1)[..., :-1] @ v


def sinks_first(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    s = torch.cat([m.view(1, H, 1, 1).expand(q.shape[0], H, N, 1), q @ k.mT * SCALE], -1)
    return s.softmax(-1)[..., 1:] @ v


def one_more(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = torch.exp(q @ k.mT * SCALE)
    return e / (1 + e.sum(-1, keepdim=True)) @ v


def one_more_in_range(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT * SCALE
    top = F.relu(s.amax(-1, keepdim=True))
    e = (s - top).exp()
    return (e @ v) / (torch.exp(-top) + e.sum(-1, keepdim=True))


def one_more_squeezed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT * SCALE
    top = s.amax(-1).clamp(min=0)
    e = torch.exp(s - top[..., None])
    return e / (e.sum(-1) + torch.exp(0 - top)).unsqueeze(-1) @ v


def one_more_by_logs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT * SCALE
    return torch.exp(s - F.softplus(s.logsumexp(-1, keepdim=True))) @ v


def zeros_in_front(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT * SCALE
    return soft(torch.cat([torch.zeros_like(s[..., :1]), s], -1)) @ F.pad(v, (0, 0, 1, 0))


def sink_in_the_sum(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    s = q @ k.mT * SCALE
    sink = m.view(-1, 1, 1)
    top = torch.maximum(s.amax(-1, keepdim=True), sink)
    e = torch.exp(s - top)
    return e / (e.sum(-1, keepdim=True) + torch.exp(sink - top)) @ v


def sink_by_logs(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    s = q @ k.mT * SCALE
    return torch.exp(s - torch.logaddexp(s.logsumexp(-1), m[:, None])[..., None]) @ v


def grouped_5d(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.view(-1, 2, H // 2, N, D)
    w = soft(q @ k.unsqueeze(2).mT * SCALE)
    return (w @ v.unsqueeze(2)).reshape(-1, H, N, E)


def grouped_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.view(-1, 2, H // 2, N, D)
    w = soft(torch.einsum("bkgnd,bkmd->bkgnm", q, k) * SCALE)
    return torch.einsum("bkgnm,bkme->bnkge", w, v).reshape(-1, N, H * E)


def repeat_kv(x: Tensor) -> Tensor:
    b, heads, length, size = x.shape
    return x[:, :, None].expand(b, heads, 2, length, size).reshape(b, heads * 2, length, size)


def through_bmm(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    b = q.shape[0]
    s = torch.baddbmm(m.expand(b, H, N, M).reshape(b * H, N, M), q.reshape(b * H, N, D), k.reshape(b * H, M, D).mT,
                      beta=0.5, alpha=SCALE)  # fmt: skip
    return torch.bmm(soft(s), v.reshape(b * H, M, E)).view(b, H, N, E).transpose(1, 2).reshape(b, N, H * E)


WINDOW_MASKS = torch.linspace(-1.0, 1.0, 2 * N * M).view(2, N, M)


def windows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A mask per window, windows folded into the batch (swin)."""
    s = q @ k.mT * SCALE
    s = s.view(-1, 2, H, N, M) + WINDOW_MASKS.unsqueeze(1).unsqueeze(0)
    return soft(s.view(-1, H, N, M)) @ v


def relative_rows(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    """A bias per row of a key grid of 3 by 3."""
    s = (q @ k.mT * SCALE).view(-1, H, N, 3, 3) + m[..., None]
    return soft(s.view(-1, H, N, M)) @ v


def later_mask(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return (soft(q @ k.mT * SCALE) * m) @ v


SPELLINGS = [
    Spelling("matmul", lambda q, k, v: soft(q @ k.transpose(-2, -1) * SCALE) @ v),
    Spelling("scaled queries", lambda q, k, v: soft((q * SCALE) @ k.mT) @ v),
    Spelling("scaled keys", lambda q, k, v: soft(q @ (k / math.sqrt(D)).mT) @ v, score=f"s * {1 / math.sqrt(D)!r}"),
    Spelling("both scaled", lambda q, k, v: soft((q * 0.5) @ (k * 0.5).transpose(2, 3)) @ v, score="s * 0.25"),
    Spelling("unscaled", lambda q, k, v: soft(q @ k.mT) @ v, score="s"),
    Spelling("divided", lambda q, k, v: soft(q @ k.mT / 4.0) @ v, score="s * 0.25"),
    Spelling("keys times queries", lambda q, k, v: ((k @ q.mT * SCALE).softmax(-2)).mT @ v),
    Spelling("values first", lambda q, k, v: (v.mT @ (k @ q.mT * SCALE).softmax(-2)).mT),
    Spelling(
        "einsum",
        lambda q, k, v: torch.einsum("bhij,bhje->bihe", soft(torch.einsum("bhid,bhjd->bhij", q, k) * SCALE), v),
    ),
    Spelling(
        "einsum with dots",
        lambda q, k, v: torch.einsum("...ij,...je->...ie", soft(torch.einsum("...id,...jd->...ij", q * SCALE, k)), v),
    ),
    Spelling(
        "einsum, queries last",
        lambda q, k, v: torch.einsum("bhji,bhje->bhie", (torch.einsum("bhid,bhjd->bhji", q, k) * SCALE).softmax(2), v),
    ),
    Spelling(
        "multiply and sum",
        lambda q, k, v: (soft((q.unsqueeze(3) * k.unsqueeze(2)).sum(-1) * SCALE).unsqueeze(-1) * v.unsqueeze(2)).sum(3),
    ),
    Spelling(
        "tokens first",
        lambda q, k, v: torch.einsum("bhnm,bmhe->bnhe", soft(torch.einsum("bnhd,bmhd->bhnm", q, k) * SCALE), v),
        inputs=tokens_first,
    ),
    Spelling("stable by hand", stable),
    Spelling("stable in a smaller range", stable_in_a_smaller_range),
    Spelling("times the reciprocal", unnormalised_first),
    Spelling("sum clamped below one", clamped_sum),
    Spelling("exp of log_softmax", lambda q, k, v: F.log_softmax(q @ k.mT * SCALE, -1).exp() @ v),
    Spelling("logsumexp", log_sum),
    Spelling("masked exponentials", masked_exponentials, keep="~t0[b, 0, 0, j]", inputs=with_mask(B, 1, 1, M)),
    Spelling("multiplied exponentials", multiplied_exponentials, keep="t0[b, 0, i, j]", inputs=with_mask(B, 1, N, M)),
    Spelling("divided behind the values", divided_behind),
    Spelling("divided behind an einsum", divided_behind_einsum),
    Spelling("powers of two", powers_of_two, score=f"s * {math.log(2.0)!r}"),
    Spelling(
        "relative positions first",
        relative_first,
        score=f"(s + t0[b, h, i, j]) * {SCALE!r}",
        inputs=lambda: (*qkv(), torch.randn(N, M, D)),
    ),
    Spelling("one query for all", lambda q, k, v: soft(q[:1] @ k.mT * SCALE) @ v),
    Spelling("a zero sink", lambda q, k, v: soft(F.pad(q @ k.mT * SCALE, (0, 1)))[..., :-1] @ v, sink="0.0"),
    Spelling("one in the denominator", one_more, sink="0.0"),
    Spelling("one in the denominator, in range", one_more_in_range, sink="0.0"),
    Spelling("one in the denominator, squeezed", one_more_squeezed, sink="0.0"),
    Spelling("one in the denominator, by logarithms", one_more_by_logs, sink="0.0"),
    Spelling("a zero sink and a zero value", zeros_in_front, sink="0.0"),
    Spelling("sinks in the sum", sink_in_the_sum, sink="t0[h]", inputs=with_bias(H)),
    Spelling("sinks by logarithms", sink_by_logs, sink="t0[h]", inputs=with_bias(H)),
    Spelling(
        "einsum of three, a bias",
        lambda q, k, v, m: soft(torch.einsum("bhid,bhjd,bij->bhij", q, k, m)) @ v,
        score="s * t0[b, 0, i, j]",
        inputs=with_bias(B, N, M),
    ),
    Spelling(
        "einsum of three, a number a head",
        lambda q, k, v, m: torch.einsum(
            "bhij,jh,bhje->bhie", soft(torch.einsum("h,bhid,bhjd->bhij", m, q, k)), m.new_ones(M, H), v
        ),
        score="s * t0[0, h, 0, 0]",
        after="t1[0, h, 0, j] * w",
        inputs=with_bias(H),
    ),
    Spelling("one key", lambda q, k, v: soft(q @ k[:, :, :1].mT * SCALE) @ v[:, :, :1]),
    Spelling("two products", two_products, score="s + t0[b, h, i, j] * 2.0"),
    Spelling("no batch, no heads", lambda q, k, v: soft(q @ k.t() * SCALE) @ v, inputs=single, heads=1, kv_heads=1),
    Spelling(
        "fused, no batch", lambda q, k, v: F.scaled_dot_product_attention(q, k, v), inputs=single, heads=1, kv_heads=1
    ),
    Spelling(
        "fused, batch alone", lambda q, k, v: F.scaled_dot_product_attention(q, k, v), inputs=flat, heads=1, kv_heads=1
    ),
    Spelling("float32 inside", lambda q, k, v: F.softmax(q @ k.mT * SCALE, -1, dtype=torch.float32).to(q.dtype) @ v),
    Spelling("tril", tril, keep="~t0[i, j]", inputs=square, score=f"s / {math.sqrt(D)!r}"),
    Spelling("triu added", triu_added, score=f"s * {SCALE!r} + t0[i, j]", inputs=square),
    Spelling(
        "boolean mask",
        lambda q, k, v, m: soft((q @ k.mT * SCALE).masked_fill(~m[:, None, None], -1e4)) @ v,
        keep="~t0[b, 0, 0, j]",
        inputs=with_mask(B, M),
    ),
    Spelling(
        "where",
        lambda q, k, v, m: soft(torch.where(m, q @ k.mT * SCALE, -torch.inf)) @ v,
        keep="t0[b, 0, i, j]",
        inputs=with_mask(B, 1, N, M),
    ),
    Spelling(
        "softcap, then a mask",
        softcap,
        score=f"tanh(s * {SCALE!r} / 5.0) * 5.0",
        keep="t0[b, 0, 0, j]",
        inputs=with_mask(B, 1, 1, M),
    ),
    Spelling(
        "bias per head",
        lambda q, k, v, m: soft(q @ k.mT * SCALE + m) @ v,
        score=f"s * {SCALE!r} + t0[h, i, j]",
        inputs=with_bias(H, N, M),
    ),
    Spelling(
        "slope per head",
        lambda q, k, v, m: soft(q @ k.mT * SCALE + m) @ v,
        score=f"s * {SCALE!r} + t0[h, 0, j]",
        inputs=with_bias(H, 1, M),
    ),
    Spelling(
        "temperature per head",
        lambda q, k, v, m: soft(q @ k.mT * m) @ v,
        score="s * t0[h, 0, 0]",
        inputs=with_bias(H, 1, 1),
    ),
    Spelling(
        "scale after a bias",
        lambda q, k, v, m: soft((q @ k.mT + m) * 0.5) @ v,
        score="(s + t0[b, h, i, j]) * 0.5",
        inputs=with_bias(B, H, N, M),
    ),
    Spelling("in place", inplace, score=f"s * {SCALE!r} + t0[b, 0, i, j]", inputs=with_bias(B, 1, N, M)),
    Spelling("filled in place", inplace_fill, keep="~t0[b, 0, 0, j]", inputs=with_mask(B, 1, 1, M)),
    Spelling(
        "copied into a slice",
        sliced_copy,
        score=f"s * {SCALE!r} + t0[b, h, i, j // 3]",
        inputs=with_bias(B, H, 2, 3, 3),
    ),
    Spelling(
        "bmm over batch and heads",
        lambda q, k, v: torch.bmm(soft(torch.bmm(q, k.transpose(1, 2)) * SCALE), v),
        inputs=flat,
        heads=1,
        kv_heads=1,
    ),
    Spelling(
        "baddbmm with a bias", through_bmm, score=f"s * {SCALE!r} + t0[b, h, i, j] * 0.5", inputs=with_bias(B, H, N, M)
    ),
    Spelling("sinks, last", sinks_last, sink="t0[h]", inputs=with_bias(H)),
    Spelling("sinks, first", sinks_first, sink="t0[h]", inputs=with_bias(H)),
    Spelling("repeat_kv", lambda q, k, v: soft(q @ repeat_kv(k).mT * SCALE) @ repeat_kv(v), inputs=grouped, kv_heads=2),
    Spelling(
        "repeat_interleave",
        lambda q, k, v: soft(q @ k.repeat_interleave(2, 1).mT * SCALE) @ v.repeat_interleave(2, 1),
        inputs=grouped,
        kv_heads=2,
    ),
    Spelling(
        "heads repeated as a whole",
        lambda q, k, v: soft(q @ k.repeat(1, 2, 1, 1).mT * SCALE) @ v.repeat(1, 2, 1, 1),
        inputs=grouped,
    ),
    Spelling("grouped in five dimensions", grouped_5d, inputs=grouped, kv_heads=2),
    Spelling("grouped einsum", grouped_einsum, inputs=grouped, kv_heads=2),
    Spelling("one key head", lambda q, k, v: soft(q @ k[:, :1].mT * SCALE) @ v[:, :1], inputs=grouped, kv_heads=1),
    Spelling("mask per window", windows, score=f"s * {SCALE!r} + t0[0, b % 2, 0, i, j]", inputs=batch_of_eight),
    Spelling(
        "bias per row of a grid",
        relative_rows,
        score=f"s * {SCALE!r} + t0[b, h, i, j // 3, 0]",
        inputs=with_bias(B, H, N, 3),
    ),
    Spelling("mask behind the softmax", later_mask, after="t0[h, i, j] * w", inputs=with_bias(H, N, M)),
    Spelling("inactive dropout", lambda q, k, v: F.dropout(soft(q @ k.mT * SCALE), 0.1, False) @ v),
    Spelling(
        "empty rows to zero",
        lambda q, k, v, m: torch.nan_to_num(soft((q @ k.mT * SCALE).masked_fill(~m, -torch.inf))) @ v,
        keep="~t0[b, 0, i, j]",
        inputs=with_mask(B, 1, N, M),
    ),
    Spelling("fused", lambda q, k, v: F.scaled_dot_product_attention(q, k, v)),
    Spelling("fused, own scale", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.5), score="s * 0.5"),
    Spelling("fused, causal", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), keep="j <= i"),
    Spelling(
        "fused, boolean",
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
        keep="t0[b, 0, 0, j]",
        inputs=with_mask(B, 1, 1, M),
    ),
    Spelling(
        "fused, additive",
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
        score=f"s * {SCALE!r} + t0[b, h, i, j]",
        inputs=with_bias(B, H, N, M),
    ),
    Spelling(
        "fused, grouped",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        inputs=grouped,
        kv_heads=2,
    ),
    Spelling(
        "fused, repeat_kv",
        lambda q, k, v: F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v)),
        inputs=grouped,
        kv_heads=2,
    ),
]
