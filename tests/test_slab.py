"""Simplified linear attention against its card, on grids of keys and of queries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear_swaps import PIXELS, assert_swapped
from torch import Tensor

import reattend.passes  # noqa: F401 - fills the registry
from reattend.compiler.functional import attention
from reattend.compiler.problem import problem
from reattend.compiler.refusal import Refused


def learned(keys: int, size: int = 5) -> dict[str, Tensor]:
    shapes = {"pos_k": (1, keys, 32), "dwc_weight": (8, 1, size, size), "dwc_bias": (8,)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def rows(q: Tensor, k: Tensor, v: Tensor, place: Tensor, eps: float = 1e-6) -> Tensor:
    """One head and one row at a time."""
    o = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for h in range(q.shape[1]):
        for i in range(q.shape[2]):
            top, bottom = 0.0, eps
            for j in range(k.shape[2]):
                key = (k[:, h, j] + place[0, j, h * 8 : (h + 1) * 8]).clamp(min=0)
                s = (q[:, h, i].clamp(min=0) * key).sum(-1, keepdim=True)
                top, bottom = top + s * v[:, h, j], bottom + s
            o[:, h, i] = top / bottom
    return o


def convolved(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Every head's channels with the same kernels: image (B, H, h, w, D), sums over taps written out."""
    half = weight.shape[2] // 2
    h, w = image.shape[2:4]
    o = bias.expand_as(image).clone()
    for y in range(h):
        for x in range(w):
            for dy in range(-half, half + 1):
                for dx in range(-half, half + 1):
                    if 0 <= y + dy < h and 0 <= x + dx < w:
                        o[:, :, y, x] += image[:, :, y + dy, x + dx] * weight[:, 0, dy + half, dx + half]
    return o


@pytest.mark.parametrize(("h", "w", "size"), [(1, 1, 5), (2, 5, 5), (3, 3, 3)])
def test_is_the_formula(h: int, w: int, size: int) -> None:
    q, k, v = problem(h * w, dtype=torch.float64)
    p = learned(h * w, size)
    expected = rows(q, k, v, p["pos_k"])
    expected = expected + convolved(v.unflatten(2, (h, w)), p["dwc_weight"], p["dwc_bias"]).flatten(2, 3)
    assert torch.allclose(attention(q, k, v, "slab", grid=(h, w), params=p, dwc_kernel=size), expected, atol=1e-10)
    single = attention(q.float(), k.float(), v.float(), "slab", grid=(h, w), dwc_kernel=size,
                       params={n: t.float() for n, t in p.items()})  # fmt: skip
    assert torch.allclose(single, expected.float(), atol=2e-5)  # values up to 20


@pytest.mark.parametrize("upsample", ["linear1d", "bilinear2d"])
def test_reduced_keys(upsample: str) -> None:
    q, k, v = problem(24, 6, dtype=torch.float64)
    p = learned(6)
    got = attention(q, k, v, "slab", grid=(4, 6), kv_grid=(2, 3), upsample=upsample, params=p)
    rows_v = v.mT.flatten(0, 1)
    if upsample == "linear1d":
        large = torch.nn.functional.interpolate(rows_v, 24, mode="linear").unflatten(2, (4, 6))
    else:
        large = torch.nn.functional.interpolate(rows_v.unflatten(2, (2, 3)), (4, 6), mode="bilinear")
    image = large.unflatten(0, (2, 4)).permute(0, 1, 3, 4, 2)
    expected = rows(q, k, v, p["pos_k"]) + convolved(image, p["dwc_weight"], p["dwc_bias"]).flatten(2, 3)
    assert torch.allclose(got, expected, atol=1e-10)


def test_prefix_tokens_take_no_part_in_the_convolution() -> None:
    q, k, v = problem(8, dtype=torch.float64)
    p = learned(8)
    expected = rows(q, k, v, p["pos_k"])
    image = v[:, :, 2:].unflatten(2, (2, 3))
    expected[:, :, 2:] += convolved(image, p["dwc_weight"], p["dwc_bias"]).flatten(2, 3)
    assert torch.allclose(attention(q, k, v, "slab", grid=(2, 3, 2), params=p), expected, atol=1e-10)


def test_a_query_without_a_positive_channel_gets_the_convolution() -> None:
    q, k, v = problem(6)
    got = attention(-q.abs(), k, v, "slab", grid=(2, 3), params={"dwc_bias": torch.ones(8)})
    assert torch.equal(got, torch.ones_like(v))


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({}, "needs the tokens' grid"),
        ({"grid": (2, 3), "causal": True}, "noncausal"),
        ({"grid": (2, 3), "kv_grid": (2, 2)}, "give kv_grid"),
        ({"grid": (2, 3), "upsample": "nearest"}, "one of linear1d"),
    ],
)
def test_what_does_not_fit_is_refused(how: dict[str, Any], match: str) -> None:
    with pytest.raises(Refused, match=match):
        attention(*problem(6), "slab", **how)


def test_in_a_vit_of_pixels() -> None:
    assert_swapped(PIXELS, {"slab": {}}, {"pos_k", "dwc_weight", "dwc_bias"})
