"""Blocks with a halo against loops over all pairs, and against timm's layer: tables, padding, strides, ragged grids."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.layers.halo_attn import HaloAttn
from torch import Tensor

import reattend
from reattend.compiler.functional import attention
from reattend.compiler.problem import problem
from reattend.compiler.refusal import Refused


def written_out(
    q: Tensor, k: Tensor, v: Tensor, h: int, w: int, b: int, r: int, rel: Any, zero: bool, scaled: bool
) -> Tensor:
    """One query and one key at a time; rel is (rel_h, rel_w) or None."""
    q, k, v = (t.double() for t in (q, k, v))
    scale, win, o = q.shape[3] ** -0.5, b + 2 * r, torch.zeros_like(q)
    for i in range(h * w):
        y, x = divmod(i, w)
        top, left = y // b * b - r, x // b * b - r
        logits, values = [], []
        for ky in range(win):
            for kx in range(win):
                j_y, j_x = top + ky, left + kx
                inside = 0 <= j_y < h and 0 <= j_x < w
                if not inside and not zero:
                    continue
                key = k[:, :, j_y * w + j_x] if inside else torch.zeros_like(k[:, :, 0])
                position = 0.0
                if rel is not None:
                    position = q[:, :, i] @ (rel[0][ky - y % b + win - 1] + rel[1][kx - x % b + win - 1]).double()
                logits.append(scale * (q[:, :, i] * key).sum(-1) + (scale if scaled else 1.0) * position)
                values.append(v[:, :, j_y * w + j_x] if inside else torch.zeros_like(v[:, :, 0]))
        a = torch.stack(logits, -1).softmax(-1)
        o[:, :, i] = (a[..., None] * torch.stack(values, -2)).sum(-2)
    return o


@pytest.mark.parametrize(("h", "w", "b", "r"), [(4, 6, 2, 1), (4, 4, 4, 3), (5, 7, 3, 2), (3, 3, 1, 1), (5, 4, 2, 0)])
@pytest.mark.parametrize("pad_mode", ["mask", "zero"])
@pytest.mark.parametrize("scale_pos_bias", [None, False, True])
def test_written_out(h: int, w: int, b: int, r: int, pad_mode: str, scale_pos_bias: bool | None) -> None:
    q, k, v = problem(h * w)
    rel = None if scale_pos_bias is None else (torch.randn(2 * (b + 2 * r) - 1, 8), torch.randn(2 * (b + 2 * r) - 1, 8))
    params = {} if rel is None else {"rel_h": rel[0], "rel_w": rel[1]}
    got = attention(q, k, v, "halo", grid=(h, w), block=b, halo=r, pad_mode=pad_mode, rel_pos=rel is not None,
                    scale_pos_bias=bool(scale_pos_bias), params=params)  # fmt: skip
    expected = written_out(q, k, v, h, w, b, r, rel, pad_mode == "zero", bool(scale_pos_bias))
    assert torch.allclose(got.double(), expected, atol=1e-5)


@pytest.mark.parametrize(("block", "stride"), [(4, 1), (4, 2), (3, 2)])
@pytest.mark.parametrize("scaled", [False, True])
def test_timm_s_layer(block: int, stride: int, scaled: bool) -> None:
    torch.manual_seed(0)
    layer = HaloAttn(16, stride=stride, num_heads=2, block_size=block, halo_size=1, scale_pos_embed=scaled)
    x = torch.randn(2, 16, 2 * block * 2, block * 2)
    q = torch.nn.functional.conv2d(x, layer.q.weight).flatten(2).unflatten(1, (2, 8)).mT
    k, v = layer.kv(x).flatten(2).unflatten(1, (2, 16)).mT.split(8, -1)
    params = {"rel_h": layer.pos_embed.height_rel, "rel_w": layer.pos_embed.width_rel}
    got = attention(q, k, v, "halo", grid=x.shape[2:], params=params, block=block, halo=1, pad_mode="zero",
                    scale_pos_bias=scaled, query_stride=stride)  # fmt: skip
    assert torch.allclose(got.mT.flatten(1, 2).unflatten(2, (x.shape[2] // stride, -1)), layer(x), atol=1e-5)


def test_prefix_tokens_see_all_and_are_seen_by_all() -> None:
    q, k, v = problem(14)
    params = {"rel_h": torch.randn(7, 8), "rel_w": torch.randn(7, 8)}
    got = attention(q, k, v, "halo", grid=(3, 4, 2), block=2, halo=1, params=params)
    assert torch.allclose(got[:, :, :2], attention(q, k, v, "softmax")[:, :, :2], atol=1e-6)
    i, win, b = 2 + 5, 4, 2  # y = 1, x = 1: the first block, whose halo holds rows 0 .. 2 and columns 0 .. 2
    seen = [(y, x) for y in range(3) for x in range(3)]
    keys = [0, 1] + [2 + 4 * y + x for y, x in seen]
    add = [torch.zeros(2, 4)] * 2 + [
        q[:, :, i] @ (params["rel_h"][y + 1 - 1 + win - 1] + params["rel_w"][x + 1 - 1 + win - 1]) for y, x in seen
    ]
    a = ((q[:, :, i, None] * k[:, :, keys]).sum(-1) * 8**-0.5 + torch.stack(add, -1)).softmax(-1)
    assert b == 2 and torch.allclose(got[:, :, i], (a[..., None] * v[:, :, keys]).sum(-2), atol=1e-5)


def test_refusals() -> None:
    q, k, v = problem(12)
    with pytest.raises(Refused, match="give grid="):
        attention(q, k, v, "halo")
    with pytest.raises(Refused, match="noncausal"):
        attention(q, k, v, "halo", grid=(3, 4), causal=True)
    with pytest.raises(Refused, match="not a grid of 3 x 3"):
        attention(q, k, v, "halo", grid=(3, 3))


def test_in_a_vision_model() -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", class_token=False, global_pool="avg", **sizes).eval()
    x = torch.randn(2, 3, 32, 32)
    recipe = {"version": 1, "sites": [{"match": "*", "attention": {"halo": {"block": 2, "halo": 1}}}]}
    fast = reattend.optimize(model, recipe, x, measure=False)
    fast(x).square().sum().backward()
    assert all(p.grad.any() for name, p in fast.named_parameters() if "rel_" in name)
