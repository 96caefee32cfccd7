"""Spellings of attention and of masks that nobody had in mind: one site, the model's numbers at sizes never fitted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reattend
from reattend.compiler.capture import capture
from reattend.compiler.masks import fold_masks
from reattend.compiler.primitives.attend_spec import AttendSpec
from reattend.compiler.raising import raise_sites

C, H, D = 24, 4, 6
LOWEST = torch.finfo(torch.float32).min
SIZES = ((2, 9), (1, 1), (2, 2), (3, 7), (2, 21))


@dataclass(frozen=True)
class Form:
    """How o comes from q, k, v (B, H, N, D); what the predicate must be, None where a tensor over pairs stays."""

    run: Callable[[Unfamiliar, Tensor, Tensor, Tensor, Tensor], Tensor]
    keep: str | None = ""
    sites: int = 1
    kv_heads: int = H
    dynamic: bool = True

    @property
    def name(self) -> str:
        return self.run.__name__


class Unfamiliar(nn.Module):
    """Projections around a form, with the learned tensors that forms ask for."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        self.q, self.o = nn.Linear(C, H * D), nn.Linear(H * D, C)
        self.k, self.v = (nn.Linear(C, form.kv_heads * D) for _ in range(2))
        self.temperature = nn.Parameter(torch.rand(H, 1, 1) + 0.5)
        self.norm_q, self.norm_k = nn.LayerNorm(D), nn.RMSNorm(D)
        self.memory_k, self.memory_v = (nn.Parameter(torch.randn(H, 3, D)) for _ in range(2))
        self.buckets = nn.Embedding(8, H)
        self.slopes: Tensor
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, H + 1).float())
        self.widths: Tensor
        self.register_buffer("widths", torch.tensor([1, 2, 4, 8]))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, H, D).transpose(1, 2)
        k, v = (layer(x).view(b, n, self.form.kv_heads, D).transpose(1, 2) for layer in (self.k, self.v))
        return self.o(self.form.run(self, q, k, v, ids).transpose(1, 2).flatten(2))


M = Unfamiliar


def count(t: Tensor) -> tuple[Tensor, Tensor]:
    n = torch.arange(t.shape[-2])
    return n[:, None], n[None, :]


# --- products and softmaxes


def exp_and_sum(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    e = torch.exp(q @ k.mT / D**0.5)
    return e @ v / e.sum(-1, keepdim=True)


def divided_with_tokens_first(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    e = torch.exp(torch.einsum("bhqd,bhkd->bhqk", q, k))
    o = torch.einsum("bhqk,bhkd->bqhd", e, v) / e.sum(-1).transpose(1, 2)[..., None]
    return o.transpose(1, 2)


def multiplied_with_one_over_the_sum(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    e = torch.exp(k @ q.mT - (k @ q.mT).amax(-2, keepdim=True))
    return ((e.mT @ v).transpose(1, 2) * (1 / (e.sum(2) + 1e-20)).transpose(1, 2)[..., None]).transpose(1, 2)


def one_over_the_sum(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    e = torch.exp(q @ k.mT)
    return (e * (1 / e.sum(-1, keepdim=True))) @ v


def exponentials_of_a_triangle(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    e = torch.ones(q.shape[2], q.shape[2]).tril() * torch.exp(q @ k.mT)
    return e / e.sum(-1, keepdim=True) @ v


def renormalised(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    w = (q @ k.mT).softmax(-1) * (1 - torch.ones(q.shape[2], q.shape[2]).triu(1))
    return (w / w.sum(-1, keepdim=True)) @ v


def log_sum_exp(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    s = torch.einsum("zyxw,zyuw->zyxu", q, k)
    return torch.einsum("zyxu,zyuw->zyxw", (s - s.logsumexp(-1, keepdim=True)).exp(), v)


def log_softmax(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return F.log_softmax((q * D**-0.5) @ k.transpose(-1, -2), dim=-1).exp() @ v


def keys_by_queries(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return (v.mT @ (k @ q.mT).softmax(-2)).mT


def float64_softmax(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return F.softmax(q @ k.mT, -1, dtype=torch.float64).to(q.dtype) @ v


def loop_over_heads(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return torch.stack([(q[:, h] @ k[:, h].mT * 0.3).softmax(-1) @ v[:, h] for h in range(H)], 1)


def heads_in_chunks(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    parts = zip(q.chunk(2, 1), k.chunk(2, 1), v.chunk(2, 1), strict=True)
    return torch.cat([(a @ b.mT).softmax(-1) @ c for a, b, c in parts], 1)


def nested(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    def weights(a: Tensor, b: Tensor) -> Tensor:
        def scaled(x: Tensor) -> Tensor:
            return x / math.sqrt(x.shape[-1])

        return torch.softmax(scaled(a) @ b.mT, dim=-1)

    return weights(q, k) @ v


def mapped(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    one = lambda a, b, c: (a @ b.T).softmax(-1) @ c
    return torch.vmap(torch.vmap(one))(q, k, v)


def added_to_nothing(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    a, b, c = (t.flatten(0, 1) for t in (q, k, v))
    s = torch.baddbmm(torch.empty(a.shape[0], a.shape[1], b.shape[1]), a, b.mT, beta=0, alpha=D**-0.5)
    return torch.bmm(s.softmax(-1), c).view_as(q)


def under_autocast(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return (q.float() @ k.float().mT).softmax(-1).type_as(v) @ v


def in_half_precision(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return ((q @ k.mT).softmax(-1) @ v).float()


def cast_as_scores(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    s = q @ k.mT
    i, j = count(q)
    return (s + torch.where(j > i, -1e9, 0.0).type_as(s)).softmax(-1).type_as(s) @ v


def with_dropout(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return F.dropout((q @ k.mT * 0.4).softmax(-1), 0.1, m.training) @ v


def one_head(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    a, b, c = (t.transpose(1, 2).flatten(2) for t in (q, k, v))
    return ((a @ b.mT).softmax(-1) @ c).unflatten(2, (H, D)).transpose(1, 2)


def blocks_of_three(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    a, b, c = (t.unflatten(2, (-1, 3)) for t in (q, k, v))
    return ((a @ b.mT).softmax(-1) @ c).flatten(2, 3)


def one_key_head(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    s = torch.einsum("bhid,bjd->bhij", q, k[:, 0])
    return torch.einsum("bhij,bjd->bhid", s.softmax(-1), v[:, 0])


def repeated_heads(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(2, dim=-3) for t in (k, v))
    return (q @ k.mT).softmax(-1) @ v


def fused_grouped(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2, enable_gqa=True)


def memory_in_front(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    k = torch.cat([m.memory_k.expand(q.shape[0], -1, -1, -1), k], 2)
    v = torch.cat([m.memory_v.expand(q.shape[0], -1, -1, -1), v], 2)
    return (q @ k.mT * 0.5).softmax(-1) @ v


# --- scores


def cosine(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    s = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
    return (s * m.temperature.clamp(max=4.6).exp()).softmax(-1) @ v


def normed(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return (m.norm_q(q) @ m.norm_k(k).mT).div(D**0.5).softmax(-1) @ v


def rotary(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    angle = torch.arange(q.shape[2])[:, None] * 0.1 ** torch.arange(D // 2)
    cos, sin = angle.cos(), angle.sin()

    def turn(t: Tensor) -> Tensor:
        a, b = t[..., ::2], t[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

    return (turn(q) @ turn(k).mT).softmax(-1) @ v


def alibi(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    i, j = count(q)
    s = q @ k.mT - m.slopes[:, None, None] * (i - j).abs()
    return s.masked_fill(j > i, -math.inf).softmax(-1) @ v


def bucketed(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    i, j = count(q)
    bias = m.buckets((j - i).abs().clamp(max=7)).permute(2, 0, 1)
    return (q @ k.mT + bias).softmax(-1) @ v


# --- masks


def scaled_behind_the_mask(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    i, j = count(q)
    return ((q @ k.mT).masked_fill(j > i, -1e9) * D**-0.5).softmax(-1) @ v


def multiplied_mask(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return (q @ k.mT + (1.0 - (ids > 0).float())[:, None, None, :] * -1e9).softmax(-1) @ v


def zeroed_then_lowered(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """As GPT-2 first wrote it: w * b - 1e10 * (1 - b)."""
    keep = torch.ones(q.shape[2], q.shape[2]).tril()
    return (q @ k.mT * keep - 1e10 * (1 - keep)).softmax(-1) @ v


def triangle_of_infinity(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return (q @ k.mT + torch.full((q.shape[2], q.shape[2]), -math.inf).triu(1)).softmax(-1) @ v


def filled_like(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    s = q @ k.mT
    return (
        torch.where(torch.ones_like(s).tril().bool(), s, torch.full_like(s, torch.finfo(s.dtype).min)).softmax(-1) @ v
    )


def new_triangle(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    s = q @ k.mT
    return (s + torch.triu(s.new_full((q.shape[2], q.shape[2]), -math.inf), 1) + s.new_zeros(1)).softmax(-1) @ v


def lightly_added(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """As BERT first wrote it."""
    return (q @ k.mT + (1.0 - (ids > 0).float())[:, None, None, :] * -10000.0).softmax(-1) @ v


def every_second(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    i, j = count(q)
    return (q @ k.mT + torch.where((i - j).remainder(2) == 0, 0.0, -1e4)).softmax(-1) @ v


def outer_padding(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    real = (ids > 0).float()
    return (q @ k.mT).masked_fill(torch.einsum("bi,bj->bij", real, real)[:, None] == 0, -1e9).softmax(-1) @ v


def column_times_row(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    real = (ids > 0).float()[:, None]
    return (q @ k.mT).masked_fill((real.mT @ real)[:, None] == 0, -1e9).softmax(-1) @ v


def documents_by_difference(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    marks = (ids == 1).cumsum(-1)
    apart = marks[:, None, :, None] - marks[:, None, None, :]
    return (q @ k.mT).masked_fill((apart != 0) | torch.ones_like(apart).triu(1).bool(), -math.inf).softmax(-1) @ v


def slice_written(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    s = q @ k.mT
    s[..., 0:1] = s[..., 0:1] * 2.0
    return s.softmax(-1) @ v


def slice_cleared(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    s = q @ k.mT
    s[..., 1:] = -math.inf
    return s.softmax(-1) @ v


def last_column_cleared(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    s = q @ k.mT
    s[:, :2] += 1.5
    s[:, :, :, -1] = -1e9
    return s.softmax(-1) @ v


def put_where(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    s, (i, j) = q @ k.mT, count(q)
    s[(i < j).expand_as(s)] = -math.inf
    return s.softmax(-1) @ v


def half_of_another(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    s = q @ k.mT
    s[..., :1] = s[..., -1:] * 2.0
    return s.softmax(-1) @ v


def documents(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    same = ids.unsqueeze(1) == ids.unsqueeze(2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=same.unsqueeze(1))


def block_diagonal(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    i, j = count(q)
    return (q @ k.mT).where(torch.eq(i // 4, j // 4), LOWEST).softmax(-1) @ v


def prefix(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    i, j = count(q)
    return (q @ k.mT).masked_fill(~((j <= i) | (j < 3)), -1e9).softmax(-1) @ v


def dilated(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    i, j = count(q)
    keep = ((i - j) % 2 == 0) & (i - j >= 0) & (i - j < 6)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def window_by_triangles(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    ones = torch.ones(q.shape[2], q.shape[2])
    return (q @ k.mT).masked_fill(ones.tril() * ones.triu(-3) == 0, -1e9).softmax(-1) @ v


def window_per_head(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    i, j = count(q)
    keep = (j <= i) & (i - j < m.widths[:, None, None])
    return (q @ k.mT).masked_fill(~keep, -math.inf).softmax(-1) @ v


def self_excluded(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    own = torch.eye(q.shape[2], dtype=torch.bool)
    return (q @ k.mT).masked_fill(own, torch.finfo(q.dtype).min).softmax(-1) @ v


def length_mask(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    lengths = (ids > 0).sum(-1)
    keep = torch.arange(q.shape[2])[None, :] < lengths[:, None]
    return (q @ k.mT).masked_fill(~keep[:, None, None], -1e4).softmax(-1) @ v


def additive_fused(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    mask = torch.zeros(q.shape[2], q.shape[2]).masked_fill(torch.ones(q.shape[2], q.shape[2]).triu(1) == 1, LOWEST)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None, None], scale=1.0)


def causal_twice(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    i, j = count(q)
    s = torch.where(i >= j, q @ k.mT, -1e9)
    return (s + torch.triu(torch.ones_like(s), 1) * -1e9).softmax(-1) @ v


FORMS = [
    Form(exp_and_sum), Form(divided_with_tokens_first), Form(multiplied_with_one_over_the_sum), Form(one_over_the_sum),
    Form(new_triangle, "j <= i"), Form(lightly_added, "0 < t0[b, j]"), Form(every_second, "(i - j) % 2 == 0"),
    Form(outer_padding, "(0 < t0[b, i]) & (0 < t0[b, j])"), Form(column_times_row, "(0 < t0[b, i]) & (0 < t0[b, j])"),
    Form(documents_by_difference, "(j <= i) & (t0[b, i] == t0[b, j])"), Form(log_sum_exp),
    Form(exponentials_of_a_triangle, "j <= i"), Form(renormalised, "j <= i"),
    Form(log_softmax), Form(keys_by_queries), Form(float64_softmax),
    Form(loop_over_heads, sites=H), Form(heads_in_chunks, sites=2), Form(nested), Form(added_to_nothing),
    Form(under_autocast), Form(cast_as_scores, "j <= i"), Form(with_dropout), Form(one_head),
    Form(blocks_of_three, dynamic=False), Form(one_key_head, kv_heads=1), Form(repeated_heads, kv_heads=2),
    Form(fused_grouped, "j <= i", kv_heads=2), Form(memory_in_front),
    Form(cosine), Form(normed), Form(rotary), Form(alibi, "j <= i"), Form(bucketed),
    Form(scaled_behind_the_mask, "j <= i"), Form(multiplied_mask, "0 < t0[b, j]"), Form(zeroed_then_lowered, "j <= i"),
    Form(slice_written, None), Form(slice_cleared, None), Form(last_column_cleared, None), Form(put_where, "j <= i"),
    Form(triangle_of_infinity, "j <= i"), Form(filled_like, "j <= i"), Form(documents, "t0[b, i] == t0[b, j]"),
    Form(block_diagonal, "i // 4 == j // 4"), Form(prefix, "(j <= 2) | (j <= i)"),
    Form(dilated, "((i - j) % 2 == 0) & (i <= j + 5) & (j <= i)"), Form(window_by_triangles, "(i <= j + 3) & (j <= i)"),
    Form(window_per_head, "(i - j < t0[h]) & (j <= i)"),
    Form(self_excluded, "(i <= j - 1) | (j <= i - 1)"), Form(length_mask, "j < t0[b]"),
    Form(additive_fused, "j <= i"), Form(causal_twice, "j <= i"),
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_unfamiliar_spelling(form: Form) -> None:
    torch.manual_seed(0)
    model = Unfamiliar(form).eval()
    with torch.no_grad():
        captured = capture(model, call(*SIZES[0]), dynamic=form.dynamic)
        raised = raise_sites(captured.graph)
        verdicts = fold_masks(captured.graph)
        for size in SIZES if form.dynamic else SIZES[:1]:
            assert (captured.graph(*call(*size))[0] - model(*call(*size))).abs().max() <= 1e-5, (size, verdicts)
    assert len(raised.nodes) == form.sites and raised.misses == (), [str(m) for m in raised.misses]
    left = [n for n in captured.graph.graph.nodes if n.target is torch.ops.reattend.attend.default]
    assert [n.args[1][0].meta["val"].shape[1] for n in left] in ([form.kv_heads], [H // form.sites] * form.sites, [1])
    if form.keep is not None:
        assert {AttendSpec.of(n.args[3]).keep for n in left} == {form.keep}, verdicts


LEFT = [
    (mapped, "inside torch.vmap"), (half_of_another, "stands %slice_scatter"),
    (in_half_precision, "inside a region of its own (wrap_with_autocast)"),
]  # fmt: skip


@pytest.mark.parametrize(("run", "reason"), LEFT, ids=lambda x: getattr(x, "__name__", ""))
def test_left_alone_and_named(run: Callable[..., Tensor], reason: str) -> None:
    model = Unfamiliar(Form(run)).eval()
    with torch.no_grad():
        captured = capture(model, call(2, 9))
        raised = raise_sites(captured.graph)
        assert (captured.graph(*call(2, 9))[0] - model(*call(2, 9))).abs().max() <= 1e-5
    assert raised.nodes == () and [m for m in raised.misses if reason in m.reason], raised.misses


def call(batch: int, length: int) -> tuple[Tensor, Tensor]:
    given = torch.Generator().manual_seed(batch * length)
    return torch.randn(batch, length, C, generator=given), torch.randint(0, 3, (batch, length), generator=given)


# --- facts that follow from how it was written ------------------------------------------------------------------------


def divided(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return (q @ k.mT / 2.5).softmax(-1) @ v  # no power of two: 1 / 2.5 is another number


def divided_with_a_bias(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return ((q @ k.mT * 2.0 + m.temperature) / 5).softmax(-1) @ v


def near_ones(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    apart = (ids[:, None, :, None] - ids[:, None, None]).abs() * ids[:, None, None]
    return (q @ k.mT * 0.4).masked_fill(apart == 1, -1e9).softmax(-1) @ v


FACTS = [(divided, frozenset()), (divided_with_a_bias, frozenset({"bias"})), (near_ones, frozenset({"mask"}))]


@pytest.mark.parametrize(("run", "features"), FACTS, ids=lambda x: getattr(x, "__name__", ""))
def test_scale_and_features_are_those_of_the_formula(run: Callable[..., Tensor], features: frozenset[str]) -> None:
    torch.manual_seed(0)
    fast = reattend.optimize(Unfamiliar(Form(run)).eval(), "exact", call(2, 9), measure=False)
    (row,) = fast.sites
    assert row.site.scale == pytest.approx(0.4) and row.site.features == features


def test_a_hidden_state_with_tokens_first_is_no_port() -> None:
    class TokensFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)

        def forward(self, x: Tensor) -> Tensor:  # (N, B, C)
            q, k, v = self.qkv(x).view(x.shape[0], -1, 3, C // H).permute(2, 1, 0, 3)
            o = torch.bmm(torch.bmm(q, k.mT).softmax(-1), v)
            return self.out(o.transpose(0, 1).reshape(x.shape))

    model, x = TokensFirst().eval(), torch.randn(9, 2, C)
    fast = reattend.optimize(model, "exact", x, measure=False)
    (row,) = fast.sites
    assert not {"x", "x_kv"} & set(row.site.ports) and row.site.self_attention
    with pytest.raises(reattend.Refused, match="moh asks for port x, which this site does not have"):
        reattend.optimize(model, "moh", x, measure=False)
