"""Routed regions against loops over regions and heads: ragged grids, both paddings, soft routing, convolution of v."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import reattend
from reattend.compiler.functional import attention
from reattend.compiler.problem import problem
from reattend.compiler.refusal import Refused


def written_out(
    q: Tensor, k: Tensor, v: Tensor, h: int, w: int, size: Any, topk: int, zero: bool, soft: bool
) -> Tensor:
    """One sample and one region at a time."""
    q, k, v = (t.double() for t in (q, k, v))
    scale, o = q.shape[3] ** -0.5, torch.zeros_like(q)
    across = -(-w // size[1])
    places = [i // w // size[0] * across + i % w // size[1] for i in range(h * w)]
    regions = [[i for i, at in enumerate(places) if at == r] for r in range(max(places) + 1)]
    for b in range(q.shape[0]):
        means = [[t[b][:, rows].mean(1).flatten() for rows in regions] for t in (q, k)]
        for r, rows in enumerate(regions):
            scores = torch.stack([means[0][r] @ other for other in means[1]]) * scale
            order = sorted(range(len(regions)), key=lambda n: (-float(scores[n]), n))[:topk]
            shares = scores[order].softmax(0) if soft else torch.ones(topk)
            keys, values = [], []
            for n, share in zip(order, shares, strict=True):
                beyond = torch.zeros(q.shape[1], size[0] * size[1] - len(regions[n]) if zero else 0, q.shape[3])
                keys += [k[b][:, regions[n]] * share, beyond]
                values += [v[b][:, regions[n]] * share, beyond]
            weights = (q[b][:, rows] @ torch.cat(keys, 1).mT * scale).softmax(-1)
            o[b][:, rows] = weights @ torch.cat(values, 1)
    return o


@pytest.mark.parametrize(("h", "w", "regions", "size"), [(4, 6, (2, 3), (2, 2)), (5, 7, (2, 3), (2, 2))])
@pytest.mark.parametrize(("topk", "soft"), [(1, False), (3, False), (2, True)])
@pytest.mark.parametrize("pad_mode", ["mask", "zero"])
def test_written_out(h: int, w: int, regions: Any, size: Any, topk: int, soft: bool, pad_mode: str) -> None:
    q, k, v = problem(h * w)
    got = attention(q, k, v, "biformer", grid=(h, w), regions=regions, topk=topk, soft_routing=soft, pad_mode=pad_mode)
    expected = written_out(q, k, v, h, w, size, topk, pad_mode == "zero", soft)
    assert torch.allclose(got.double(), expected, atol=1e-5)
    sized = attention(q, k, v, "biformer", grid=(h, w), region_size=size, topk=topk, soft_routing=soft,
                      pad_mode=pad_mode)  # fmt: skip
    assert torch.equal(sized, got)


def test_the_convolution_counts_channels_head_by_head() -> None:
    q, k, v = problem(20)
    params = {"lepe_weight": torch.randn(32, 1, 5, 5), "lepe_bias": torch.randn(32)}
    knobs: dict[str, Any] = {"grid": (4, 5), "regions": (2, 2), "topk": 2}
    got = attention(q, k, v, "biformer", lepe_kernel=5, params=params, **knobs)
    image = v.permute(0, 1, 3, 2).reshape(2, 32, 4, 5)
    conv = torch.nn.functional.conv2d(image, params["lepe_weight"], params["lepe_bias"], padding=2, groups=32)
    plain = attention(q, k, v, "biformer", lepe_kernel=0, **knobs)
    assert torch.allclose(got, plain + conv.reshape(2, 4, 8, 20).transpose(2, 3), atol=1e-5)


def test_too_many_regions_are_refused() -> None:
    with pytest.raises(Refused, match="topk=5 of 2 x 2 regions"):
        attention(*problem(16), "biformer", grid=(4, 4), regions=(2, 2), topk=5)


def test_in_a_vision_model() -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    x = torch.randn(2, 3, 32, 32)
    knobs = {"regions": [2, 2], "topk": 4}
    recipe = {"version": 1, "sites": [{"match": "*", "attention": {"biformer": knobs}}]}
    fast = reattend.optimize(model, recipe, x, measure=False)
    assert torch.allclose(fast(x), model(x), atol=1e-5)
    fast(x).square().sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in fast.parameters())
