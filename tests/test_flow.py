"""Flow attention against its card, a row at a time; its conservation, its padding, its state."""

from __future__ import annotations

import math

import pytest
import torch
from linear_swaps import assert_swapped
from torch import Tensor

import reattend.passes  # noqa: F401 - fills the registry
from reattend.compiler.decode import Decoder
from reattend.compiler.functional import attention
from reattend.compiler.mechanism import mechanism
from reattend.compiler.problem import problem
from reattend.compiler.site import Site

E = 1e-6


def dot(a: Tensor, b: Tensor, e: float = E) -> float:
    return float(((a + e) * (b + e)).sum())


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def noncausal(q: Tensor, k: Tensor, v: Tensor, c: float, more: float = 0.0) -> Tensor:
    """One head: q (L, D), k, v (S, D)."""
    q, k = torch.sigmoid(q), torch.sigmoid(k)
    L, S = len(q), len(k)
    incoming = [dot(q[i], k.sum(0)) + more for i in range(L)]
    outgoing = [dot(k[j], q.sum(0)) + more for j in range(S)]
    sink = [dot(q[i], sum(k[j] / outgoing[j] for j in range(S))) + more for i in range(L)]
    source = [dot(k[j], sum(q[i] / incoming[i] for i in range(L))) + more for j in range(S)]
    force = [math.exp(max(-c, min(c, x))) for x in source]
    values = [S * force[j] / sum(force) * v[j] for j in range(S)]
    rows = [
        sigmoid(sink[i] * L / S) * sum(float(q[i] @ k[j]) / incoming[i] * values[j] for j in range(S)) for i in range(L)
    ]
    return torch.stack(rows)


def causal(q: Tensor, k: Tensor, v: Tensor, c: float) -> Tensor:
    """One head; what row t is computed from is what stands at or before t, and c_t is fixed at its own time."""
    q, k = torch.sigmoid(q), torch.sigmoid(k)
    incoming, outgoing, force, values, rows = [], [], [], [], []
    for t in range(1, len(q) + 1):
        n = t - 1
        incoming.append(t / dot(q[n], k[:t].sum(0)))
        outgoing.append(t / dot(k[n], q[:t].sum(0)))
        sink = dot(q[n], sum(k[j] * outgoing[j] for j in range(t))) / t
        source = dot(k[n], sum(q[j] * incoming[j] for j in range(t))) / t
        force.append(math.exp(max(-c, min(c, source))))
        values.append(t * force[n] / sum(force) * v[n])
        row = sum(float(q[n] @ k[j]) * incoming[n] / t * values[j] for j in range(t))
        rows.append(sigmoid(sink) * row)
    return torch.stack(rows)


def each(formula, q: Tensor, k: Tensor, v: Tensor, *rest: float) -> Tensor:  # type: ignore[no-untyped-def]
    B, H = q.shape[:2]
    return torch.stack([torch.stack([formula(q[b, h], k[b, h], v[b, h], *rest) for h in range(H)]) for b in range(B)])


@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 7), (5, 9)])
@pytest.mark.parametrize("clamp", [1.0, 0.0, 5.0])
def test_noncausal(n: int, m: int, clamp: float) -> None:
    q, k, v = problem(n, m, dtype=torch.float64)
    expected = each(noncausal, q, k, v, clamp)
    assert torch.allclose(attention(q, k, v, "flow", clamp=clamp), expected, atol=1e-9)
    single = attention(q.float(), k.float(), v.float(), "flow", clamp=clamp)
    assert torch.allclose(single, expected.float(), atol=1e-5)


def test_the_vision_code_adds_to_every_flow() -> None:
    q, k, v = problem(7, dtype=torch.float64)
    expected = each(noncausal, q, k, v, 1.0, 1e-3)
    assert torch.allclose(attention(q, k, v, "flow", sum_eps=1e-3), expected, atol=1e-9)


@pytest.mark.parametrize("n", [1, 7, 65])
@pytest.mark.parametrize("clamp", [1.0, 10.0])
def test_causal(n: int, clamp: float) -> None:
    q, k, v = problem(n, dtype=torch.float64, heads=1)
    expected = each(causal, q, k, v, clamp)
    assert torch.allclose(attention(q, k, v, "flow", causal=True, clamp=clamp), expected, atol=1e-9)
    single = attention(q.float(), k.float(), v.float(), "flow", causal=True, clamp=clamp)
    assert torch.allclose(single, expected.float(), atol=1e-5)


@pytest.mark.parametrize("order", [False, True])
def test_padded_tokens_are_not_there(order: bool) -> None:
    q, k, v = problem(7, batch=1)
    real = torch.ones(1, 7, dtype=torch.bool)
    real[0, [0, 3]] = False
    got = attention(q, k, v, "flow", causal=order, mask=real)[:, :, real[0]]
    alone = attention(q[:, :, real[0]], k[:, :, real[0]], v[:, :, real[0]], "flow", causal=order)
    assert torch.allclose(got, alone, atol=1e-5)


def test_grouped_heads_are_repeated() -> None:
    q, k, v = problem(6, kv_heads=2)
    many = [t.repeat_interleave(2, 1) for t in (k, v)]
    assert torch.allclose(attention(q, k, v, "flow"), attention(q, *many, "flow"))


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_decoding_keeps_sums(kv_heads: int) -> None:
    q, k, v = problem(9, kv_heads=kv_heads)
    site = Site("layer", 0, heads=4, kv_heads=kv_heads, dim=8, v_dim=8, scale=8**-0.5, pattern="causal-self")
    decoder = Decoder(mechanism("flow"), site)
    parts = [decoder.prefill(q[:, :, :4], k[:, :, :4], v[:, :, :4])]
    parts += [decoder.step(q[:, :, n : n + 1], k[:, :, n : n + 1], v[:, :, n : n + 1]) for n in range(4, 9)]
    assert torch.allclose(torch.cat(parts, 2), attention(q, k, v, "flow", causal=True), atol=1e-5)
    assert decoder.state_bytes == 2 * 4 * (4 * 8 + 2 + 8 * 8) * 4


@pytest.mark.parametrize("family", ["gpt2", pytest.param("bert_padded", marks=pytest.mark.slow)])
def test_in_models(family: str) -> None:
    assert_swapped(family, {"flow": {}}, set())
