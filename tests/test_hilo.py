"""HiLo heads against loops over queries and windows: shares of heads, ragged grids, prefix tokens, padding."""

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
    q: Tensor, k: Tensor, v: Tensor, h: int, w: int, s: int, high: int, real: Tensor | None = None
) -> Tensor:
    """One query at a time: the first `high` heads over their window, the others over the means of all windows."""
    q, k, v = (t.double() for t in (q, k, v))
    o = torch.zeros_like(q)
    where = [(i // w // s, i % w // s) for i in range(h * w)]
    for b in range(q.shape[0]):
        is_real = [real is None or bool(real[b, i]) for i in range(h * w)]
        windows = {at: [i for i in range(h * w) if where[i] == at and is_real[i]] for at in where}
        full = [rows for rows in windows.values() if rows]
        for head in range(q.shape[1]):
            for i in range(h * w):
                if head < high:
                    keys, values = k[b, head, windows[where[i]]], v[b, head, windows[where[i]]]
                else:
                    keys = torch.stack([k[b, head, rows].mean(0) for rows in full])
                    values = torch.stack([v[b, head, rows].mean(0) for rows in full])
                if len(keys):
                    o[b, head, i] = (keys @ q[b, head, i] * q.shape[3] ** -0.5).softmax(0) @ values
    return o


@pytest.mark.parametrize(("h", "w", "s"), [(4, 6, 2), (5, 7, 2), (3, 3, 4), (5, 4, 3)])
@pytest.mark.parametrize(("alpha", "high"), [(0.0, 4), (0.5, 2), (0.9, 1), (1.0, 0)])
@pytest.mark.parametrize("padded", [False, True])
def test_written_out(h: int, w: int, s: int, alpha: float, high: int, padded: bool) -> None:
    q, k, v = problem(h * w)
    real = torch.rand(2, h * w, generator=torch.Generator().manual_seed(1)) < 0.6 if padded else None
    got = attention(q, k, v, "hilo", grid=(h, w), window=s, alpha=alpha, mask=real)
    assert torch.allclose(got.double(), written_out(q, k, v, h, w, s, high, real), atol=1e-5)


def test_groups_of_heads_do_not_meet() -> None:
    q, k, v = problem(16)
    moved = [torch.cat((t[:, :2], torch.randn(2, 2, 16, 8)), 1) for t in (q, k, v)]
    got = attention(*moved, "hilo", grid=(4, 4))
    assert torch.equal(got[:, :2], attention(q, k, v, "hilo", grid=(4, 4))[:, :2])


def test_prefix_tokens_are_keys_of_all_heads() -> None:
    q, k, v = problem(14, kv_heads=2)
    got = attention(q, k, v, "hilo", grid=(3, 4, 2), window=2)
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    assert torch.allclose(got[:, :2, :2], attention(q, k, v, "softmax")[:, :2, :2], atol=1e-6)
    seen = [0, 1, 2, 3, 6, 7]  # the two prefix tokens, and the window of row 2
    near = attention(q[:, :2, 2:3], k[:, :2, seen], v[:, :2, seen], "softmax")
    assert torch.allclose(got[:, :2, 2:3], near, atol=1e-6)
    blocks = [[0], [1], [2, 3, 6, 7], [4, 5, 8, 9], [10, 11], [12, 13]]
    pooled = [torch.stack([t[:, 2:, rows].mean(2) for rows in blocks], 2) for t in (k, v)]
    assert torch.allclose(got[:, 2:], attention(q[:, 2:], *pooled, "softmax"), atol=1e-6)


@pytest.mark.parametrize("knobs", [{"alpha": 1.5}, {"window": 0}])
def test_refusals(knobs: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="window >= 1, 0 <= alpha <= 1"):
        attention(*problem(12), "hilo", grid=(3, 4), **knobs)


def test_in_a_vision_model() -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    x = torch.randn(2, 3, 32, 32)

    def swapped(window: int) -> Any:
        recipe = {"version": 1, "sites": [{"match": "*", "attention": {"hilo": {"window": window}}}]}
        return reattend.optimize(model, recipe, x, measure=False)

    assert torch.allclose(swapped(1)(x), model(x), atol=1e-5)
    fast = swapped(2)
    fast(x).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in fast.parameters())
