"""Based against loops over rows, its narrow projections, its hybrid of two kinds of layers, its state."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from linear_swaps import assert_swapped, swapped
from torch import Tensor

import reattend.passes  # noqa: F401 - fills the registry
from reattend.compiler.decode import Decoder
from reattend.compiler.functional import attention
from reattend.compiler.mechanism import mechanism
from reattend.compiler.problem import problem
from reattend.compiler.refusal import Refused
from reattend.compiler.site import Site


def rows(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-12, real: Tensor | None = None) -> Tensor:
    """One sample, one head and one row at a time, the polynomial written out."""
    o = torch.zeros_like(v)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for n in range(q.shape[2]):
                top, bottom = torch.zeros(v.shape[3], dtype=v.dtype), eps
                for m in range(n + 1):
                    if real is not None and not real[b, m]:
                        continue
                    s = float(q[b, h, n] @ k[b, h, m]) / math.sqrt(q.shape[3])
                    w = 1 + s + s * s / 2
                    top, bottom = top + w * v[b, h, m], bottom + w
                o[b, h, n] = top / bottom
    return o


@pytest.mark.parametrize("n", [1, 7, 66])
@pytest.mark.parametrize("knobs", [{}, {"compressed": True}, {"eps": 1e-6}])
def test_is_the_taylor_polynomial(n: int, knobs: dict[str, Any]) -> None:
    q, k, v = problem(n, dtype=torch.float64, heads=2, batch=1)
    expected = rows(q, k, v, knobs.get("eps", 1e-12))
    assert torch.allclose(attention(q, k, v, "based", causal=True, **knobs), expected, atol=1e-10)
    single = attention(q.float(), k.float(), v.float(), "based", causal=True, **knobs)
    assert torch.allclose(single, expected.float(), atol=1e-5)


def test_padding_is_not_counted() -> None:
    q, k, v = problem(7, dtype=torch.float64)
    real = torch.ones(2, 7, dtype=torch.bool)
    real[0, :2] = real[1, 4] = False
    assert torch.allclose(attention(q, k, v, "based", causal=True, mask=real), rows(q, k, v, real=real), atol=1e-10)


def test_a_scale_of_its_own_and_grouped_heads() -> None:
    q, k, v = problem(5, kv_heads=2, dtype=torch.float64)
    many = [t.repeat_interleave(2, 1) for t in (k, v)]
    expected = rows(q * 0.5 * 8**0.5, *many)
    assert torch.allclose(attention(q, k, v, "based", causal=True, scale=0.5), expected, atol=1e-10)


def test_narrow_projections_from_the_hidden_state() -> None:
    q, k, v = problem(6, dtype=torch.float64)
    x = torch.randn(2, 6, 20, dtype=torch.float64)
    p = {name: torch.randn(12, 20, dtype=torch.float64) for name in ("proj_q", "proj_k")}
    got = attention(q, k, v, "based", causal=True, feature_dim=3, ports={"x": x}, params=p)
    narrow = [(x @ p[name].T).view(2, 6, 4, 3).transpose(1, 2) for name in ("proj_q", "proj_k")]
    assert torch.allclose(got, rows(*narrow, v), atol=1e-10)


def test_the_thunder_kittens_form() -> None:
    q, k, v = problem(6, dtype=torch.float64)
    s = q @ k.mT * 8**-0.5
    o = (1 + s + s**2 / 2).tril() @ v
    weight = torch.randn(8, dtype=torch.float64)
    expected = o / (o.square().mean(-1, True) + 1e-5).sqrt() * weight
    got = attention(q, k, v, "based", causal=True, g_norm=True, params={"g_norm": weight})
    assert torch.allclose(got, expected, atol=1e-10)


def test_sliding_layers_see_half_of_the_named_window() -> None:
    q, k, v = problem(9)
    far = torch.arange(9)[:, None] - torch.arange(9)
    s = (q @ k.mT * 8**-0.5).masked_fill((far < 0) | (far > 3), -torch.inf)
    got = attention(q, k, v, "based", causal=True, sliding=True, window_size=6)
    assert torch.allclose(got, torch.softmax(s, -1) @ v, atol=1e-6)


@pytest.mark.parametrize(("knobs", "rows"), [({}, 73), ({"compressed": True}, 45)])
def test_decoding_keeps_one_state(knobs: dict[str, Any], rows: int) -> None:
    q, k, v = problem(7)
    site = Site("layer", 0, heads=4, kv_heads=4, dim=8, v_dim=8, scale=8**-0.5, pattern="causal-self")
    decoder = Decoder(mechanism("based", **knobs), site)
    parts = [decoder.prefill(q[:, :, :4], k[:, :, :4], v[:, :, :4])]
    parts += [decoder.step(q[:, :, n : n + 1], k[:, :, n : n + 1], v[:, :, n : n + 1]) for n in range(4, 7)]
    assert torch.allclose(torch.cat(parts, 2), attention(q, k, v, "based", causal=True, **knobs), atol=1e-5)
    assert decoder.state_bytes == 2 * 4 * rows * (8 + 1) * 4


def test_refused_where_there_is_no_order() -> None:
    with pytest.raises(Refused, match="causal-self"):
        attention(*problem(4), "based")


@pytest.mark.slow
def test_in_a_llama() -> None:
    assert_swapped("llama", {"based": {"feature_dim": 4}}, {"proj_q", "proj_k"})


def test_the_hybrid_is_a_recipe() -> None:
    rules = [
        {"match": "**layers.0.**", "attention": {"based": {"feature_dim": 0}}},
        {"match": "*", "attention": {"based": {"sliding": True, "window_size": 4}}},
    ]
    fast, output = swapped("llama", rules)
    called = [str(node.target) for node in fast.graph.graph.nodes if str(node.target).startswith("reattend.")]
    assert called == ["reattend.scan.default", "reattend.attend.default"]
    assert torch.isfinite(output).all()


@pytest.mark.parametrize(("kind", "rank"), [("llama", 4), ("gpt2", 3), ("gpt2", 11)])
def test_narrow_projections_start_at_the_best_product_of_their_rank(kind: str, rank: int) -> None:
    """In a model they start by the SVD of W_q^T W_k, whichever way it stores the two."""
    fast, _ = swapped(kind, {"based": {"feature_dim": rank}})
    first = next(m for n, m in fast.named_modules() if n.endswith(("self_attn", "attn")))
    if kind == "gpt2":
        width = first.c_attn.weight.shape[0]
        W_q, W_k = (t.T for t in first.c_attn.weight.detach().split(width, 1)[:2])
        heads = kv = first.num_heads
    else:
        W_q, W_k = first.q_proj.weight.detach(), first.k_proj.weight.detach()
        heads, kv = first.config.num_attention_heads, first.config.num_key_value_heads
    dim = W_q.shape[0] // heads
    named = {n: t.detach() for n, t in fast.named_parameters() if ".based.proj_" in n}
    own = {n.rpartition(".")[2]: t for n, t in sorted(named.items(), reverse=True)}  # the first layer's come last
    for h in range(heads):
        here = slice(h * dim, (h + 1) * dim)
        g = h * kv // heads
        product = W_q[here].T @ W_k[g * dim : (g + 1) * dim] * dim**-0.5
        u, s, vh = torch.linalg.svd(product)
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        part = slice(h * rank, (h + 1) * rank)
        assert torch.allclose(own["proj_q"][part].T @ own["proj_k"][part] * rank**-0.5, best, atol=1e-5)
