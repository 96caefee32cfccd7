"""Aaren against a sequential softmax, its padding, its constant state."""

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


def rows(own: Tensor, k: Tensor, v: Tensor, scale: float, real: Tensor | None = None) -> Tensor:
    """The recurrent form (m, c, a), one head and one token at a time."""
    o = torch.zeros_like(v)
    for b in range(k.shape[0]):
        for h in range(own.shape[0]):
            top, mass, total = -math.inf, 0.0, torch.zeros(v.shape[3], dtype=v.dtype)
            for n in range(k.shape[2]):
                if real is None or real[b, n]:
                    s = scale * float(own[h] @ k[b, h, n])
                    new = max(top, s)
                    mass = mass * math.exp(top - new) + math.exp(s - new)
                    total = total * math.exp(top - new) + math.exp(s - new) * v[b, h, n]
                    top = new
                o[b, h, n] = total / mass if mass else total
    return o


@pytest.mark.parametrize("n", [1, 7, 66])
@pytest.mark.parametrize("scale", [None, 1.0, 300.0])
def test_is_the_recurrence(n: int, scale: float | None) -> None:
    q, k, v = problem(n, dtype=torch.float64)
    own = torch.randn(4, 8, dtype=torch.float64)
    expected = rows(own, k, v, 8**-0.5 if scale is None else scale)
    got = attention(q, k, v, "aaren", causal=True, scale=scale, params={"q": own})
    assert torch.allclose(got, expected, atol=1e-10)
    if scale != 300.0:  # where float32 cannot tell the scores apart
        single = attention(
            q.float(), k.float(), v.float(), "aaren", causal=True, scale=scale, params={"q": own.float()}
        )
        assert torch.allclose(single, expected.float(), atol=1e-5)
    last = attention(q, k, v, "aaren", scale=scale, params={"q": own})
    assert torch.allclose(last, expected[:, :, -1:].expand_as(v), atol=1e-10)


def test_padded_rows_are_passed_over() -> None:
    q, k, v = problem(7, dtype=torch.float64)
    own = torch.randn(4, 8, dtype=torch.float64)
    real = torch.ones(2, 7, dtype=torch.bool)
    real[0, :2] = real[1, 3] = False
    expected = rows(own, k, v, 8**-0.5, real)
    assert torch.allclose(attention(q, k, v, "aaren", causal=True, mask=real, params={"q": own}), expected, atol=1e-10)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_decoding_keeps_one_element(kv_heads: int) -> None:
    q, k, v = problem(9, kv_heads=kv_heads)
    own = {"q": torch.randn(4, 8)}
    site = Site("layer", 0, heads=4, kv_heads=kv_heads, dim=8, v_dim=8, scale=8**-0.5, pattern="causal-self")
    decoder = Decoder(mechanism("aaren"), site, params=own)
    parts = [decoder.prefill(q[:, :, :4], k[:, :, :4], v[:, :, :4])]
    parts += [decoder.step(q[:, :, n : n + 1], k[:, :, n : n + 1], v[:, :, n : n + 1]) for n in range(4, 9)]
    assert torch.allclose(torch.cat(parts, 2), attention(q, k, v, "aaren", causal=True, params=own), atol=1e-5)
    assert decoder.state_bytes == 2 * 4 * (8 + 1) * 4


@pytest.mark.slow
def test_in_a_gpt2() -> None:
    assert_swapped("gpt2", {"aaren": {}}, {"q"})
