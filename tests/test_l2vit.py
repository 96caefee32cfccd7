"""L2ViT's attention against its card, a row at a time, around the least denominator."""

from __future__ import annotations

import pytest
import torch
from linear_swaps import PIXELS, assert_swapped
from torch import Tensor

import reattend.passes  # noqa: F401 - fills the registry
from reattend.compiler.functional import attention
from reattend.compiler.problem import problem


def rows(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, least: float, causal: bool) -> Tensor:
    o = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for h in range(q.shape[1]):
        for i in range(q.shape[2]):
            top, bottom = torch.zeros_like(v[:, h, 0]), torch.zeros_like(v[:, h, 0, :1])
            for j in range(i + 1 if causal else k.shape[2]):
                s = (q[:, h, i].clamp(min=0) * k[:, h, j].clamp(min=0)).sum(-1, keepdim=True)
                top, bottom = top + s * v[:, h, j], bottom + s
            o[:, h, i] = temperature[h] * top / bottom.clamp(min=least)
    return o


@pytest.mark.parametrize(("n", "m", "causal"), [(1, 1, False), (7, 7, False), (3, 9, False), (7, 7, True)])
@pytest.mark.parametrize("least", [0.5, 6.0, 100.0])
def test_is_the_formula(n: int, m: int, causal: bool, least: float) -> None:
    q, k, v = problem(n, m, dtype=torch.float64)
    temperature = torch.randn(4, dtype=torch.float64)
    expected = rows(q, k, v, temperature, least, causal)
    how = {"causal": causal, "denom_min": least}
    assert torch.allclose(attention(q, k, v, "l2vit", params={"temperature": temperature}, **how), expected, atol=1e-10)
    single = attention(q.float(), k.float(), v.float(), "l2vit", params={"temperature": temperature.float()}, **how)
    assert torch.allclose(single, expected.float(), atol=1e-5)


def test_padding_is_not_counted() -> None:
    q, k, v = problem(7)
    real = torch.ones(2, 7, dtype=torch.bool)
    real[:, 5:] = False
    got = attention(q, k, v, "l2vit", mask=real)
    assert torch.allclose(got, attention(q, k[:, :, :5], v[:, :, :5], "l2vit"), atol=1e-6)


def test_in_a_vit() -> None:
    assert_swapped(PIXELS, {"l2vit": {}}, {"temperature"})
