"""A site's own sliding window is a feature: kept by a swap, or refused, or dropped where the recipe says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reattend
from reattend.compiler.mechanism import mechanisms

NEAR = 3


class Near(nn.Module):
    """Causal attention within a sliding window (Mistral, Gemma)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def rows(self, x: Tensor) -> Tensor:
        return self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.rows(x)
        i = torch.arange(x.shape[1])
        lag = i[:, None] - i
        o = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=(lag >= 0) & (lag < NEAR))
        y: Tensor = self.out(o.transpose(1, 2).flatten(2))
        return y


def swapped(model: Near, x: Tensor, slug: str, **more: Any) -> Any:
    rule = {"match": "*", "attention": {slug: {}}, **more}
    return reattend.optimize(model, {"version": 1, "sites": [rule]}, x, measure=False)


def test_it_is_a_feature_and_said_once() -> None:
    site = reattend.sites(Near().eval(), torch.randn(2, 9, 16))[0]
    assert site.features == {"window"} and site.window == NEAR
    assert str(site).endswith("attention[causal-self h=4 d=4 window=3]")


@pytest.mark.parametrize("slug", ["linear", "aaren", "lightning", "flow", "lssar"])
def test_what_cannot_keep_it_is_refused(slug: str) -> None:
    with pytest.raises(reattend.Refused, match=r"does not honour window \(`drop: \[window\]` permits it\)"):
        swapped(Near().eval(), torch.randn(2, 9, 16), slug)


@torch.no_grad()
def test_dropped_by_the_recipe_it_is_gone() -> None:
    model, x = Near().eval(), torch.randn(2, 9, 16)
    for slug in ("linear", "lightning"):
        fast = swapped(model, x, slug, drop=["window"])
        assert fast.report.rows[0].dropped == ("window",)
        o = reattend.attention(*model.rows(x), slug, causal=True)
        torch.testing.assert_close(fast(x), model.out(o.transpose(1, 2).flatten(2)), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "slug", [s for s, cls in mechanisms().items() if cls.part == "core" and "window" in cls.honours]
)
def test_what_says_that_it_keeps_it_does(slug: str) -> None:
    model, x = Near().eval(), torch.randn(2, 9, 16)
    site = reattend.sites(model, x)[0]
    if mechanisms()[slug]().refuses(site):
        pytest.skip("refused for another reason")
    fast = swapped(model, x, slug)
    far = torch.cat([x[:, :-NEAR] + 1.0, x[:, -NEAR:]], 1)
    torch.testing.assert_close(fast(far)[:, -1], fast(x)[:, -1], rtol=0, atol=1e-5)
