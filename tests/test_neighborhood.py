"""Neighborhood attention against loops over all pairs: 1-D to 3-D, dilation, stride, causal axes, extra keys."""

from __future__ import annotations

import itertools
from math import prod
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import reattend
from reattend.compiler.functional import attention
from reattend.compiler.problem import problem
from reattend.compiler.refusal import Refused
from reattend.compiler.site import Grid
from reattend.passes.sparse.neighborhood_axis import Axis
from reattend.passes.sparse.neighborhood_tiles import Plan


def near(i: int, j: int, size: int, w: int, s: int, d: int, causal: bool) -> bool:
    """One axis, in the card's words."""
    g = i % d
    if j % d != g:
        return False
    a, b, length = i // d, j // d, len(range(g, size, d))
    if causal:
        p = min((a // s) * s + s - 1, length - 1)
        return b <= a and p - b < w
    p = min((a // s) * s + s // 2, length - 1)
    start = min(max(p - w // 2, 0), length - w)
    return start <= b < start + w


def written_out(
    q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, ...], *, window: Any, stride: Any = 1, dilation: Any = 1,
    causal: Any = False, rel_bias: Tensor | None = None, extra: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    each = [v_ if isinstance(v_, tuple) else (v_,) * len(grid) for v_ in (window, stride, dilation, causal)]
    places = list(itertools.product(*map(range, grid)))
    q, k, v = (t.double() for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    o = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        for i, x in enumerate(places):
            keys = [j for j, y in enumerate(places) if all(map(near, x, y, grid, *each))]
            logits = torch.stack([q[b, h, i] @ k[b, h // group, j] for j in keys]) * q.shape[3] ** -0.5
            if rel_bias is not None:
                at = [tuple((y - x_) // d + w - 1 for x_, y, w, d in zip(x, places[j], each[0], each[2], strict=True))
                      for j in keys]  # fmt: skip
                logits = logits + torch.stack([rel_bias[h][index].double() for index in at])
            values = v[b, h // group, keys]
            if extra is not None:
                more_k, more_v = (t[b, h // group].double() for t in extra)
                logits = torch.cat((logits, more_k @ q[b, h, i] * q.shape[3] ** -0.5))
                values = torch.cat((values, more_v))
            o[b, h, i] = logits.softmax(0) @ values
    return o


CASES: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((11,), {"window": 4}),
    ((11,), {"window": 3, "stride": 2}),
    ((11,), {"window": 5, "stride": 4, "causal": (True,)}),
    ((11,), {"window": 3, "dilation": 3}),
    ((11,), {"window": 3, "dilation": 2, "stride": 3, "causal": (True,)}),
    ((5, 7), {"window": 3}),
    ((5, 7), {"window": (4, 3), "stride": (3, 1), "dilation": (1, 2)}),
    ((4, 5), {"window": (2, 5), "causal": (True, False)}),
    ((3, 2, 4), {"window": (2, 2, 3), "causal": (True, False, False)}),
    ((2, 4, 3), {"window": (2, 2, 2), "stride": (2, 1, 2), "dilation": (1, 2, 1)}),
]


@pytest.mark.parametrize(("grid", "knobs"), CASES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_every_axis(grid: tuple[int, ...], knobs: dict[str, Any], with_bias: bool) -> None:
    q, k, v = problem(prod(grid), heads=2, kv_heads=1, dim=4)
    windows = knobs["window"] if isinstance(knobs["window"], tuple) else (knobs["window"],) * len(grid)
    bias = torch.randn(2, *(2 * w - 1 for w in windows)) if with_bias else None
    params = {} if bias is None else {"rel_bias": bias}
    got = attention(q, k, v, "neighborhood", grid=grid, params=params, **knobs)
    assert torch.allclose(got.double(), written_out(q, k, v, grid, rel_bias=bias, **knobs), atol=1e-5)


@pytest.mark.parametrize("grid", [(9,), (3, 4)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_extra_keys_stand_under_the_same_softmax(grid: tuple[int, ...], with_bias: bool) -> None:
    q, k, v = problem(prod(grid), heads=2, dim=4)
    more_k, more_v = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 4)
    bias = torch.randn(2, *[5] * len(grid)) if with_bias else None
    params = {} if bias is None else {"rel_bias": bias}

    def got(order: list[int]) -> Tensor:
        ports = {"extra_k": more_k[:, :, order], "extra_v": more_v[:, :, order]}
        return attention(q, k, v, "neighborhood", grid=grid, window=3, ports=ports, params=params)

    expected = written_out(q, k, v, grid, window=3, extra=(more_k, more_v), rel_bias=bias)
    assert torch.allclose(got([0, 1, 2]).double(), expected, atol=1e-5)
    assert torch.allclose(got([2, 0, 1]), got([0, 1, 2]), atol=1e-6)


def test_prefix_tokens_see_all_and_are_seen_by_all() -> None:
    q, k, v = problem(14)
    whole = attention(q, k, v, "softmax")
    got = attention(q, k, v, "neighborhood", grid=(3, 4, 2), window=(2, 3))
    assert torch.allclose(got[:, :, :2], whole[:, :, :2], atol=1e-6)
    rows = {"extra_k": k[:, :, :2], "extra_v": v[:, :, :2]}
    rest = [t[:, :, 2:] for t in (q, k, v)]
    assert torch.allclose(
        got[:, :, 2:], attention(*rest, "neighborhood", grid=(3, 4), window=(2, 3), ports=rows), atol=1e-6
    )


def test_a_box_is_not_a_picture_with_prefix_tokens() -> None:
    q, k, v = problem(24)
    whole = attention(q, k, v, "softmax")
    assert torch.allclose(attention(q, k, v, "neighborhood", grid=(2, 3, 4), window=(2, 3, 4)), whole, atol=1e-6)
    own = reattend.Attention("neighborhood", 32, 4, window=2)  # no grid: one axis of any length
    assert own(torch.randn(2, 1, 32)).shape == (2, 1, 32)
    assert own(torch.randn(2, 9, 32)).shape == (2, 9, 32)


@pytest.mark.parametrize(
    ("grid", "knobs", "says"),
    [
        ((3, 4), {"window": 5}, "larger than the grid"),
        ((3, 4), {"window": 3, "dilation": 2}, "larger than the grid"),
        ((3, 5), {"window": 3}, "12 tokens are not a grid of 3 x 5"),
        (None, {"window": (3, 3)}, "give grid"),
        ((3, 4), {"window": 2, "stride": 3}, "1 <= stride <= window"),
        ((3, 4), {"window": (2, 2, 2)}, "has 3 axes"),
    ],
)
def test_refusals(grid: Any, knobs: dict[str, Any], says: str) -> None:
    q, k, v = problem(12)
    with pytest.raises(Refused, match=says):
        attention(q, k, v, "neighborhood", grid=grid, **knobs)


def test_in_a_vision_model() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4)
    x = torch.randn(2, 3, 32, 32)
    recipe = {"version": 1, "sites": [{"match": "*", "attention": {"neighborhood": {"window": 3, "rel_bias": True}}}]}
    fast = reattend.optimize(model.eval(), recipe, x, measure=False)
    assert fast.sites["blocks.0.attn"].site.grid == Grid(4, 4, 1)
    fast(x).square().sum().backward()
    new = {name: p for name, p in fast.named_parameters() if "rel_bias" in name}
    assert len(new) == 2
    assert new[
        "blocks.0.attn.reattend.neighborhood.rel_bias"
    ].grad.any()  # behind the last, only the class token counts
    whole = {"version": 1, "sites": [{"match": "*", "attention": {"neighborhood": {"window": 4}}}]}
    assert torch.allclose(reattend.optimize(model, whole, x, measure=False)(x), model(x), atol=1e-5)
    assert "window 3 x 3, stride 1 x 1, tiles 4 x 4 on 4 x 4: at most 1.00 x fewer" in fast.report.text()


def plan_of(
    sizes: tuple[int, ...], windows: tuple[int, ...], strides: tuple[int, ...], *tiles: tuple[int, ...]
) -> Plan:
    return Plan(tuple(map(Axis, sizes, windows, strides)), *tiles)


@pytest.mark.parametrize(
    ("plan", "bound", "block_sparse"),
    [  # published values
        (plan_of((32768,), (2048,), (1,), (128,), (128,)), 15.11, False),
        (plan_of((32768,), (2048,), (256,), (128,), (128,)), 16.0, True),
        (plan_of((256, 256), (80, 80), (16, 16), (16, 8), (16, 8)), 10.24, True),
        (plan_of((256, 256), (80, 80), (1, 1), (16, 8), (16, 8)), 7.51, False),
        (plan_of((30, 48, 80), (18, 24, 24), (16, 8, 8), (2, 8, 8), (2, 8, 8)), 11.11, True),
        (plan_of((30, 48, 80), (18, 24, 24), (1, 1, 1), (2, 8, 8), (2, 8, 8)), 5.44, False),
    ],
    ids=str,
)
def test_tiles_are_counted_as_published(plan: Plan, bound: float, block_sparse: bool) -> None:
    assert round(plan.bound, 2) == bound
    assert plan.block_sparse == block_sparse


@pytest.mark.parametrize("tile", [128, 256])
def test_the_smallest_block_sparse_stride(tile: int) -> None:
    found = plan_of((32768,), (2048,), (1,), (tile,), (128,)).sparser()
    assert found is not None and found.axes[0].stride == 256


@pytest.mark.parametrize(("size", "knobs"), [(24, (5, 2)), (23, (4, 3, 2)), (24, (6, 6, 1, True))])
def test_counted_tiles_are_those_that_hold_a_near_pair(size: int, knobs: tuple[Any, ...]) -> None:
    axis = Axis(size, *knobs)
    if axis.dilation == 1:
        pairs = {(i // 4, j // 3) for i in range(size) for j in range(size) if axis.near(i, j, size)}
        assert Plan((axis,), (4,), (3,)).bound == 6 * 8 / len(pairs)
    assert all(bool(axis.near(i, j, size)) == near(i, j, size, axis.window, axis.stride, axis.dilation, axis.causal)
               for i in range(size) for j in range(size))  # fmt: skip


def test_explain_counts_what_it_could_be_worth() -> None:
    sizes = {"img_size": 128, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "class_token": False}
    model = timm.create_model("vit_tiny_patch16_224", global_pool="avg", **sizes).eval()
    found = reattend.explain(model, torch.randn(1, 3, 128, 128)).text()
    assert "neighborhood: window 7 x 7, stride 1 x 1, tiles 16 x 8 on 16 x 8: at most 1.00 x fewer" in found
