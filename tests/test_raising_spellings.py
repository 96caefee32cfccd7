"""Attention as people write it by hand: every spelling becomes one site with its facts, and numbers stay."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reattend.compiler.capture import capture
from reattend.compiler.facts import describe
from reattend.compiler.raising import raise_sites

DIM, HEADS, SIZE = 32, 4, 8
SCALE = SIZE**-0.5


class Layer(nn.Module):
    """Projections of x (B, N, C) and of a memory (B, M, C), and tensors that spellings use."""

    def __init__(self, form: Callable[[Layer, Tensor], Tensor], kv_heads: int) -> None:
        super().__init__()
        self.form = form
        self.kv = kv_heads
        self.q, self.o = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.k, self.v = (nn.Linear(DIM, kv_heads * SIZE) for _ in range(2))
        self.wide = nn.Linear(DIM, HEADS * 12)
        self.bias = nn.Parameter(torch.randn(HEADS, 16, 16))
        self.temperature = nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)
        self.sinks = nn.Parameter(torch.randn(HEADS))
        self.register_buffer("tril", torch.tril(torch.ones(16, 16)))

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self, x)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (f(x).unflatten(-1, (-1, SIZE)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return q, k, v

    def merged(self, o: Tensor) -> Tensor:
        return self.o(o.transpose(1, 2).flatten(2))


Form = Callable[[Layer, Tensor], Tensor]


@dataclass(frozen=True)
class Spelling:
    name: str
    form: Form
    scale: float = SCALE
    heads: int = HEADS
    kv_heads: int = HEADS
    features: str = ""
    mask: bool = False  # whether the site has a predicate


def scored(score: Callable[[Layer, Tensor, Tensor], Tensor]) -> Form:
    """softmax(score(layer, q, k)) v over heads."""

    def form(m: Layer, x: Tensor) -> Tensor:
        q, k, v = m.heads(x)
        return m.merged(score(m, q, k).softmax(-1) @ v)

    return form


def weighted(weights: Callable[[Tensor], Tensor]) -> Form:
    """weights(scores) v over heads."""

    def form(m: Layer, x: Tensor) -> Tensor:
        q, k, v = m.heads(x)
        return m.merged(weights(q @ k.mT * SCALE) @ v)

    return form


def causal(n: int, x: Tensor) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool, device=x.device).tril()


def in_place(m: Layer, q: Tensor, k: Tensor) -> Tensor:
    s = q @ k.mT
    s *= SCALE
    s += m.bias[:, : q.shape[2], : k.shape[2]]
    return s


def filled_in_place(m: Layer, q: Tensor, k: Tensor) -> Tensor:
    s = q @ k.mT * SCALE
    n = q.shape[2]
    return s.masked_fill_(m.tril[:n, :n] == 0, -torch.inf)


def stable(s: Tensor) -> Tensor:
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def stable_by_values(s: Tensor) -> Tensor:
    e = (s - s.max(dim=-1, keepdim=True).values.detach()).exp()
    return e / (e.sum(dim=-1, keepdim=True) + 1e-9)


def turned(m: Layer, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return m.merged((k @ q.mT * SCALE).softmax(-2).mT @ v)


def values_first(m: Layer, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return m.merged((v.mT @ (q @ k.mT * SCALE).softmax(-1).mT).mT)


def tokens_first(m: Layer, x: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in m.heads(x))
    w = (torch.einsum("bnhd,bmhd->bhnm", q, k) * SCALE).softmax(-1)
    return m.o(torch.einsum("bhnm,bmhd->bnhd", w, v).flatten(2))


def dotted(m: Layer, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    w = torch.einsum("...id,...jd->...ij", q * SCALE, k).softmax(-1)
    return m.merged(torch.einsum("...ij,...jd->...id", w, v))


def joined(m: Layer, x: Tensor) -> Tensor:
    B, N, _ = x.shape
    q, k, v = (t.reshape(B * HEADS, N, SIZE) for t in m.heads(x))
    w = torch.bmm(q, k.transpose(1, 2)).mul(SCALE).softmax(-1)
    return m.merged(torch.bmm(w, v).view(B, HEADS, N, SIZE))


def joined_tokens_first(m: Layer, x: Tensor) -> Tensor:
    B, N, C = x.shape
    q, k, v = (f(x).view(B, N, HEADS, SIZE).transpose(1, 2).reshape(B * HEADS, N, SIZE) for f in (m.q, m.k, m.v))
    s = torch.bmm(q, k.transpose(1, 2)).view(B, HEADS, N, N) * SCALE + m.bias[:, :N, :N]
    return m.merged(torch.bmm(s.softmax(-1).view(B * HEADS, N, N), v).view(B, HEADS, N, SIZE))


def added_first(m: Layer, x: Tensor) -> Tensor:
    B, N, _ = x.shape
    q, k, v = (t.reshape(B * HEADS, N, SIZE) for t in m.heads(x))
    bias = m.bias[:, :N, :N].expand(B, -1, -1, -1).reshape(B * HEADS, N, N)
    w = torch.baddbmm(bias, q, k.transpose(1, 2), beta=1, alpha=SCALE).softmax(-1)
    return m.merged(torch.bmm(w, v).view(B, HEADS, N, SIZE))


def summed(m: Layer, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    w = ((q.unsqueeze(3) * k.unsqueeze(2)).sum(-1) * SCALE).softmax(-1)
    return m.merged((w.unsqueeze(-1) * v.unsqueeze(2)).sum(3))


def expanded(t: Tensor) -> Tensor:
    B, H, N, D = t.shape
    return t[:, :, None].expand(B, H, HEADS // H, N, D).reshape(B, HEADS, N, D)


def grouped(repeat: Callable[[Tensor], Tensor]) -> Form:
    def form(m: Layer, x: Tensor) -> Tensor:
        q, k, v = m.heads(x)
        return m.merged((q @ repeat(k).mT * SCALE).softmax(-1) @ repeat(v))

    return form


def five_axes(m: Layer, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    q = q.unflatten(1, (m.kv, HEADS // m.kv))
    w = (q @ k.unsqueeze(2).mT * SCALE).softmax(-1)
    return m.merged((w @ v.unsqueeze(2)).flatten(1, 2))


def five_axes_einsum(m: Layer, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    q = q.unflatten(1, (m.kv, HEADS // m.kv))
    w = (torch.einsum("bkgnd,bkmd->bkgnm", q, k) * SCALE).softmax(-1)
    return m.merged(torch.einsum("bkgnm,bkmd->bkgnd", w, v).flatten(1, 2))


def with_sink(m: Layer, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    s = q @ k.mT * SCALE
    s = torch.cat([s, m.sinks.view(1, -1, 1, 1).expand(s.shape[0], -1, s.shape[2], 1)], -1)
    return m.merged((s - s.amax(-1, keepdim=True)).softmax(-1)[..., :-1] @ v)


def one_head(m: Layer, x: Tensor) -> Tensor:
    return m.o((m.q(x) @ m.k(x).mT * SCALE).softmax(-1) @ m.v(x))


def no_batch(m: Layer, x: Tensor) -> Tensor:
    y = x[0]
    return m.o((m.q(y) @ m.k(y).t() * SCALE).softmax(-1) @ m.v(y))


def cross(m: Layer, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    k, v = k[:, :, ::1][:, :, :5], v[:, :, :5]
    return m.merged((q @ k.mT * SCALE).softmax(-1) @ v)


def wide_values(m: Layer, x: Tensor) -> Tensor:
    q, k, _ = m.heads(x)
    v = m.wide(x).unflatten(-1, (HEADS, 12)).transpose(1, 2)
    return ((q @ k.mT * SCALE).softmax(-1) @ v).transpose(1, 2).flatten(2)


def learned_queries(m: Layer, x: Tensor) -> Tensor:
    _, k, v = m.heads(x)
    q = m.bias[:, :5, :SIZE].unsqueeze(0)
    return m.merged((q @ k.mT * SCALE).softmax(-1) @ v)


def fused(m: Layer, x: Tensor) -> Tensor:
    return m.merged(F.scaled_dot_product_attention(*m.heads(x), is_causal=True))


SPELLINGS = [
    Spelling("scaled scores", scored(lambda m, q, k: q @ k.transpose(-2, -1) * SCALE)),
    Spelling("divided scores", scored(lambda m, q, k: q @ k.mT / 4.0), 0.25),
    Spelling("scaled queries", scored(lambda m, q, k: (q * SCALE) @ k.mT)),
    Spelling("scaled keys", scored(lambda m, q, k: q @ (k * SCALE).mT)),
    Spelling("both scaled", scored(lambda m, q, k: (q * 0.5) @ (k * 0.5).transpose(2, 3)), 0.25),
    Spelling("not scaled", scored(lambda m, q, k: q @ k.mT), 1.0),
    Spelling("summed in float32", weighted(lambda s: F.softmax(s, -1, dtype=torch.float32).to(s.dtype))),
    Spelling("casts around the softmax", weighted(lambda s: s.double().softmax(-1).to(s.dtype))),
    Spelling("bias of a parameter", scored(lambda m, q, k: q @ k.mT * SCALE + m.bias[:, :9, :9]), features="bias"),
    Spelling("temperature per head", scored(lambda m, q, k: q @ k.mT * SCALE * m.temperature), features="bias"),
    Spelling("in place", scored(in_place), features="bias"),
    Spelling("filled in place", scored(filled_in_place), features="mask", mask=True),
    Spelling("masked with -inf", scored(lambda m, q, k: (q @ k.mT * SCALE).masked_fill(~causal(9, q), -torch.inf)),
             features="mask", mask=True),
    Spelling("masked with -1e9", scored(lambda m, q, k: (q @ k.mT * SCALE).masked_fill(m.tril[:9, :9] == 0, -1e9)),
             features="mask", mask=True),
    Spelling("where", scored(lambda m, q, k: torch.where(causal(9, q), q @ k.mT * SCALE, torch.finfo(q.dtype).min)),
             features="mask", mask=True),
    Spelling("softcap", scored(lambda m, q, k: torch.tanh(q @ k.mT * SCALE / 5.0) * 5.0), features="softcap"),
    Spelling("clamped", scored(lambda m, q, k: (q @ k.mT * SCALE).clamp(-3.0, 3.0)), features="softcap"),
    Spelling("stable by hand", weighted(stable)),
    Spelling("stable with max and eps", weighted(stable_by_values)),
    Spelling("exp of log_softmax", weighted(lambda s: F.log_softmax(s, -1).exp())),
    Spelling("logsumexp", weighted(lambda s: torch.exp(s - s.logsumexp(-1, keepdim=True)))),
    Spelling("exp over its sum", weighted(lambda s: s.exp() / s.exp().sum(-1, keepdim=True))),
    Spelling("dropout that is off", weighted(lambda s: F.dropout(s.softmax(-1), 0.1, False))),
    Spelling("empty rows made zero", weighted(lambda s: s.softmax(-1).nan_to_num(0.0))),
    Spelling("weights scaled afterwards", weighted(lambda s: s.softmax(-1) * 0.5)),
    Spelling("keys times queries", turned),
    Spelling("values first", values_first),
    Spelling("tokens before heads", tokens_first),
    Spelling("einsum with dots", dotted),
    Spelling("batch and heads in one axis", joined),
    Spelling("one axis, a bias on four", joined_tokens_first, features="bias"),
    Spelling("baddbmm", added_first, features="bias"),
    Spelling("multiplied and summed", summed),
    Spelling("repeated by expand", grouped(expanded), kv_heads=2),
    Spelling("repeat_interleave", grouped(lambda t: t.repeat_interleave(2, 1)), kv_heads=2),
    Spelling("groups as an axis", five_axes, kv_heads=2),
    Spelling("groups in an einsum", five_axes_einsum, kv_heads=2),
    Spelling("one key head", grouped(lambda t: t), kv_heads=1),
    Spelling("a sink beside the scores", with_sink, features="sinks"),
    Spelling("one head without an axis", one_head, heads=1, kv_heads=1),
    Spelling("no batch", no_batch, heads=1, kv_heads=1),
    Spelling("fewer keys", cross),
    Spelling("wider values", wide_values),
    Spelling("learned queries", learned_queries),
    Spelling("fused", fused, features="", mask=True),
]  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
def test_one_site_with_its_facts(spelling: Spelling) -> None:
    model = Layer(spelling.form, spelling.kv_heads if spelling.heads == HEADS else HEADS).eval()
    x = torch.randn(2, 9, DIM)
    captured = capture(model, (x,), dynamic=False)
    with torch.no_grad():
        wanted = model(x)
        raised = raise_sites(captured.graph)
        found = captured.graph(x)[0]
    assert len(raised.nodes) == 1, [m.reason for m in raised.misses]
    assert raised.misses == ()
    (site,), _ = describe(captured.graph)
    assert (site.heads, site.kv_heads) == (spelling.heads, spelling.kv_heads)
    assert math.isclose(site.scale, spelling.scale, rel_tol=1e-6)
    assert "+".join(sorted(site.features)) == spelling.features
    assert bool(site.mask) is spelling.mask
    assert (found - wanted).abs().max() <= 1e-5


def test_a_raised_graph_runs_at_other_sizes() -> None:
    model = Layer(joined_tokens_first, HEADS).eval()
    captured = capture(model, (torch.randn(2, 9, DIM),))
    assert len(raise_sites(captured.graph).nodes) == 1
    with torch.no_grad():
        for batch, length in ((1, 7), (3, 13)):
            x = torch.randn(batch, length, DIM)
            assert (captured.graph(x)[0] - model(x)).abs().max() <= 1e-5


def test_a_row_that_keeps_nothing_keeps_its_numbers() -> None:
    """A finite fill over a whole row gives equal weights: there the fill stays part of the score."""

    class Padded(nn.Module):
        def forward(self, q: Tensor, keep: Tensor) -> Tensor:
            s = (q @ q.mT).masked_fill(~(keep[:, None, :, None] & keep[:, None, None, :]), -1e9)
            return s.softmax(-1) @ q

    q, keep = torch.randn(2, 3, 6, 4), torch.ones(2, 6, dtype=torch.bool)
    keep[1, 4:] = False
    captured = capture(Padded(), (q, keep))
    (node,) = raise_sites(captured.graph).nodes
    assert "where(" in node.args[3]
    assert (captured.graph(q, keep)[0] - Padded()(q, keep)).abs().max() <= 1e-5
