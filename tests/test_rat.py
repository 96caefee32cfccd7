"""RAT against its card: a token at a time, softmax over the entries that a token sees."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from linear_swaps import assert_swapped
from torch import Tensor

import reattend.passes  # noqa: F401 - fills the registry
from reattend.compiler.functional import attention
from reattend.compiler.problem import problem
from reattend.compiler.refusal import Refused


def turned(t: Tensor, place: int, base: float) -> Tensor:
    """rotate_half, angles duplicated; t (D,)."""
    if not base:
        return t
    d = len(t)
    angles = torch.tensor([place * base ** (-2 * (c % (d // 2)) / d) for c in range(d)], dtype=t.dtype)
    return t * angles.cos() + torch.cat((-t[d // 2 :], t[: d // 2])) * angles.sin()


def rows(q: Tensor, k: Tensor, v: Tensor, f: Tensor, opened: Tensor, size: int, base: float) -> Tensor:
    """q, k (B, G, N, D), v, f, opened (B, H, N, D); head h has q and k of group h mod G."""
    o = torch.zeros_like(v)
    for b in range(v.shape[0]):
        for h in range(v.shape[1]):
            group, seen = h % q.shape[1], []
            for n in range(v.shape[2]):
                fresh = n % size == 0
                now_k = (0 if fresh else f[b, h, n] * now_k) + (1 - f[b, h, n]) * k[b, group, n]  # noqa: F821
                now_v = (0 if fresh else f[b, h, n] * now_v) + (1 - f[b, h, n]) * v[b, h, n]  # noqa: F821
                own = (turned(now_k, n // size, base), now_v)
                entries = [*seen, own]
                assert len(entries) == n // size + 1
                query = turned(q[b, group, n], n // size, base)
                s = [math.exp(float(query @ key) * len(query) ** -0.5) for key, _ in entries]
                o[b, h, n] = sum(w / sum(s) * value for w, (_, value) in zip(s, entries, strict=True))
                if n % size == size - 1:
                    seen.append(own)
    return o * opened


@pytest.mark.parametrize(("n", "size"), [(1, 4), (8, 4), (11, 4), (7, 1), (5, 16), (9, 3)])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("base", [10000.0, 0.0])
def test_is_the_recurrence(n: int, size: int, groups: int, base: float) -> None:
    q, k, _ = problem(n, heads=groups, dtype=torch.float64)
    _, _, v = problem(n, heads=4, dtype=torch.float64, seed=1)
    g, z = torch.randn_like(v), torch.randn_like(v)
    bias = torch.randn(32, dtype=torch.float64)
    how = {"causal": True, "chunk_size": size, "ngroups": groups, "rope_base": base}
    got = attention(q, k, v, "rat", ports={"g": g, "z": z}, params={"gate_bias": bias}, **how)
    f = torch.sigmoid(g + bias.view(4, 1, 8))
    expected = rows(q, k, v, f, torch.sigmoid(z), size, base)
    assert torch.allclose(got, expected, atol=1e-10)
    single = attention(q.float(), k.float(), v.float(), "rat", ports={"g": g.float(), "z": z.float()},
                       params={"gate_bias": bias.float()}, **how)  # fmt: skip
    assert torch.allclose(single, expected.float(), atol=1e-5)


def test_gates_from_the_hidden_state() -> None:
    q, k, v = problem(7, dtype=torch.float64)
    x = torch.randn(2, 7, 20, dtype=torch.float64)
    p = {n: torch.randn(32, 20, dtype=torch.float64) for n in ("g_proj", "z_proj")}
    p |= {n: torch.randn(32, dtype=torch.float64) for n in ("gate_bias", "z_bias")}
    g, z = ((x @ p[n].T).unflatten(2, (4, 8)).transpose(1, 2) for n in ("g_proj", "z_proj"))
    from_x = attention(q, k, v, "rat", causal=True, chunk_size=4, ports={"x": x}, params=p)
    z = z + p["z_bias"].view(4, 1, 8)
    given = attention(q, k, v, "rat", causal=True, chunk_size=4, ports={"g": g, "z": z},
                      params={"gate_bias": p["gate_bias"]})  # fmt: skip
    assert torch.allclose(from_x, given, atol=1e-10)


def test_grouped_keys_of_a_model_serve_the_heads_that_they_served() -> None:
    q, k, v = problem(8, heads=6, kv_heads=2)
    wide = torch.full((2, 6, 8, 8), 60.0)
    how = {"ports": {"g": -wide, "z": wide}, "params": {"gate_bias": torch.zeros(48)}, "rope_base": 0.0}
    got = attention(q, k, v, "rat", causal=True, chunk_size=1, **how)
    assert torch.allclose(got, attention(q, k, v, "softmax", causal=True), atol=1e-6)


def test_the_sites_own_rotation_is_taken_off() -> None:
    q, k, v = problem(7)
    ports = {"g": torch.randn_like(v), "z": torch.randn_like(v)}
    plain = attention(q, k, v, "rat", causal=True, chunk_size=3, ports=ports)
    turned = attention(q + 1, k - 1, v, "rat", causal=True, chunk_size=3, ports=ports | {"q_nope": q, "k_nope": k})
    assert torch.equal(plain, turned)


@pytest.mark.parametrize(
    ("how", "match"),
    [({}, "causal-self"), ({"causal": True}, "ports g and z"), ({"causal": True, "chunk_size": 0}, "from 1 on")],
)
def test_what_does_not_fit_is_refused(how: dict[str, Any], match: str) -> None:
    with pytest.raises(Refused, match=match):
        attention(*problem(4), "rat", **how)


@pytest.mark.slow
def test_in_a_llama() -> None:
    assert_swapped("llama", {"rat": {"chunk_size": 4}}, {"gate_bias", "g_proj", "z_proj", "z_bias"})
