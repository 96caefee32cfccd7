"""Gaussian mixture masks against loops over pairs of tokens, on grids and sequences, with and without the underflow."""

from __future__ import annotations

import math

import pytest
import torch
from linear_swaps import PIXELS, assert_swapped
from torch import Tensor

import reattend.passes  # noqa: F401 - fills the registry
from reattend.compiler.functional import attention
from reattend.compiler.problem import problem
from reattend.compiler.refusal import Refused


def mask(n: int, width: int, p: dict[str, Tensor], eps: float = 1e-5, underflow: bool = False) -> Tensor:
    """m (H, N, N), a pair at a time; width 0 is a sequence."""
    m = torch.zeros(p["alpha"].shape[1], n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            d2 = (i - j) ** 2 if not width else (i // width - j // width) ** 2 + (i % width - j % width) ** 2
            if underflow and d2 > 103:
                continue
            for r in range(p["alpha"].shape[0]):
                for h in range(m.shape[0]):
                    m[h, i, j] += p["alpha"][r, h] * math.exp(-d2 / (2 * (p["sigma"][r, h] ** 2 + eps)))
    return m


def own(kernels: int) -> dict[str, Tensor]:
    return {
        "sigma": 1 + 2 * torch.rand(kernels, 4, dtype=torch.float64),
        "alpha": torch.randn(kernels, 4, dtype=torch.float64),
    }


@pytest.mark.parametrize(("h", "w"), [(1, 1), (3, 4), (2, 6), (0, 11)])
@pytest.mark.parametrize("kernels", [1, 3])
def test_is_the_formula(h: int, w: int, kernels: int) -> None:
    n = h * w or 11
    q, k, v = problem(n, dtype=torch.float64)
    p, grid = own(kernels), (h, w) if h else None
    s = mask(n, w if h else 0, p) * (q @ k.mT) * 8**-0.5
    got = attention(q, k, v, "retnet_gmm", num_kernels=kernels, grid=grid, params=p)
    assert torch.allclose(got, torch.softmax(s, -1) @ v, atol=1e-10)
    single = attention(q.float(), k.float(), v.float(), "retnet_gmm", num_kernels=kernels, grid=grid,
                       params={name: t.float() for name, t in p.items()})  # fmt: skip
    assert torch.allclose(single, (torch.softmax(s, -1) @ v).float(), atol=1e-5)


def test_a_bias_and_padding_stand_outside_of_the_product() -> None:
    q, k, v = problem(6, dtype=torch.float64)
    p, bias = own(2), torch.randn(1, 4, 6, 6, dtype=torch.float64)
    s = mask(6, 3, p) * (q @ k.mT) * 8**-0.5
    got = attention(q, k, v, "retnet_gmm", num_kernels=2, grid=(2, 3), params=p, bias=bias)
    assert torch.allclose(got, torch.softmax(s + bias, -1) @ v, atol=1e-10)
    real = torch.ones(2, 6, dtype=torch.bool)
    real[0, 4:] = False
    got = attention(q, k, v, "retnet_gmm", num_kernels=2, grid=(2, 3), params=p, mask=real)
    hidden = s.masked_fill(~real[:, None, None], -torch.inf)
    assert torch.allclose(got, torch.softmax(hidden, -1) @ v, atol=1e-10)


def test_the_underflow_of_the_papers_code() -> None:
    q, k, v = problem(13)
    p = {"sigma": torch.full((1, 4), 20.0), "alpha": torch.ones(1, 4)}
    how = {"num_kernels": 1, "params": p}
    got = attention(q, k, v, "retnet_gmm", compat_underflow=True, **how)
    cut = mask(13, 0, p, underflow=True).float()
    assert (cut[0, 0] == 0).tolist() == [False] * 11 + [True] * 2
    expected = torch.softmax(cut * (q @ k.mT) * 8**-0.5, -1) @ v
    assert torch.allclose(got, expected, atol=1e-4)  # at a distance of 10 its float32 has a digit left
    near = {"grid": (3, 4), "num_kernels": 1, "params": {"sigma": torch.full((1, 4), 1.5), "alpha": torch.ones(1, 4)}}
    q, k, v = problem(12)
    same = [attention(q, k, v, "retnet_gmm", compat_underflow=c, **near) for c in (True, False)]
    assert torch.allclose(*same, atol=1e-6)


def test_causal_sites_keep_their_order() -> None:
    q, k, v = problem(7, dtype=torch.float64)
    p = own(1)
    s = (mask(7, 0, p) * (q @ k.mT) * 8**-0.5).masked_fill(torch.ones(7, 7).triu(1) > 0, -torch.inf)
    got = attention(q, k, v, "retnet_gmm", num_kernels=1, params=p, causal=True)
    assert torch.allclose(got, torch.softmax(s, -1) @ v, atol=1e-10)


def test_prefix_tokens_have_no_distance() -> None:
    with pytest.raises(Refused, match="1 prefix tokens"):
        attention(*problem(7), "retnet_gmm", grid=(2, 3, 1))


def test_in_a_vit_of_pixels() -> None:
    assert_swapped(PIXELS, {"retnet_gmm": {}}, {"sigma", "alpha"})
