"""Gated positional attention against the dense formula, pair by pair; its local start; prefix tokens; a real model."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import reattend
from reattend.compiler.functional import attention
from reattend.compiler.place import stand, started
from reattend.compiler.problem import problem
from reattend.compiler.refusal import Refused
from reattend.passes.score.gpsa import Gpsa


def written_out(q: Tensor, k: Tensor, v: Tensor, p: dict[str, Tensor], h: int, w: int, prefix: int) -> Tensor:
    B, H, N, D = q.shape
    o = torch.zeros_like(q)
    for b in range(B):
        for head in range(H):
            g = torch.sigmoid(p["gating_param"][head])
            for i in range(N):
                P = torch.softmax(k[b, head] @ q[b, head, i] / D**0.5, 0)
                if i < prefix:
                    o[b, head, i] = P @ v[b, head]
                    continue
                R = torch.full((N,), -torch.inf, dtype=q.dtype)
                for j in range(prefix, N):
                    (r_i, c_i), (r_j, c_j) = divmod(i - prefix, w), divmod(j - prefix, w)
                    dx, dy = c_j - c_i, r_j - r_i
                    w0, w1, w2 = p["pos_proj_weight"][head]
                    R[j] = w0 * dx + w1 * dy + w2 * (dx**2 + dy**2) + p["pos_proj_bias"][head]
                A = (1 - g) * P + g * torch.softmax(R, 0)
                o[b, head, i] = A / A.sum() @ v[b, head]
    return o


@pytest.mark.parametrize(("h", "w", "prefix"), [(3, 4, 0), (5, 2, 1), (1, 7, 0), (3, 3, 2)])
def test_it_is_its_formula(h: int, w: int, prefix: int) -> None:
    q, k, v = problem(prefix + h * w, dtype=torch.float64)
    draw = torch.Generator().manual_seed(3)
    shapes = {"pos_proj_weight": (4, 3), "pos_proj_bias": (4,), "gating_param": (4,)}
    p = {name: 0.7 * torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    narrow = {name: t.float() for name, t in p.items()}
    got = attention(*(t.float() for t in (q, k, v)), "gpsa", grid=(h, w, prefix), params=narrow)
    assert torch.allclose(got.double(), written_out(q, k, v, p, h, w, prefix), atol=1e-5)


@pytest.mark.parametrize(("heads", "taps"), [(4, 4), (9, 9), (6, 4), (12, 9)])
def test_it_starts_as_the_taps_of_a_convolution(heads: int, taps: int) -> None:
    q, k, v = problem(12, heads=heads)
    weight = started(Gpsa(2.0).params(stand(q, k, v, grid=(3, 4)).site), q)["pos_proj_weight"]
    kz = int(taps**0.5)
    c = (kz - 1) / 2 if kz % 2 == 0 else kz // 2
    expected = [[2.0 * 2 * (h2 - c), 2.0 * 2 * (h1 - c), -2.0] for h2 in range(kz) for h1 in range(kz)]
    assert weight[:taps].tolist() == expected
    assert bool((weight[taps:].abs() < 0.2).all()) and bool(weight[taps:].any()) == (heads > taps)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({}, "gpsa needs the tokens' grid"),
        ({"grid": (3, 5)}, "12 tokens are not a grid of 3 x 5"),
        ({"grid": (3, 4), "causal": True}, "noncausal"),
        ({"grid": (3, 4), "locality_strength": 0.0}, "above 0"),
    ],
)
def test_where_it_does_not_fit_it_says_why(given: dict[str, Any], match: str) -> None:
    q, k, v = problem(12)
    with pytest.raises(Refused, match=match):
        attention(q, k, v, "gpsa", **given)


def test_in_a_vit_it_starts_near_the_model_and_learns() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=2, global_pool="avg").eval()
    x = torch.randn(2, 3, 48, 48)
    recipe = {"version": 1, "sites": [{"match": "*", "attention": {"gpsa": {}}}]}
    fast = reattend.optimize(model, recipe, (x,))
    y = fast(x)
    assert torch.allclose(y, model(x), atol=1e-3)  # the gate starts at sigmoid(-10), 5e-5 of the other branch
    y.square().mean().backward()
    learned = [p for n, p in fast.named_parameters() if n.endswith(("gating_param", "pos_proj_weight"))]
    assert len(learned) == 4 and all(t.grad is not None and t.grad.any() for t in learned)
