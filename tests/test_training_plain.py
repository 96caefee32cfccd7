"""A loop of one's own around an optimized image model: torch.optim, and copies that follow by moving averages."""

from __future__ import annotations

import copy
from typing import Any

import timm
import torch
from timm.utils import ModelEmaV2, ModelEmaV3
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import reattend


def trained(model: Any) -> dict[str, Any]:
    """Losses of a few steps, then the answers of the model and of its three averaged copies."""
    x, y = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 1, 4, 1])
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    second, third = ModelEmaV2(model, decay=0.5), ModelEmaV3(model, decay=0.5)
    losses = []
    for _ in range(3):
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(model)
        second.update(model)
        third.update(model)
        losses.append(loss.detach())
    with torch.no_grad():
        copies = [one.eval()(x) for one in (averaged, second.module, third.module)]
        return {"losses": losses, "model": model.eval()(x), "copies": copies}


def test_a_loop_and_its_averages_are_the_originals() -> None:
    torch.manual_seed(0)
    sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=4, num_classes=10)
    model = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    before = copy.deepcopy(model.state_dict())
    fast = reattend.optimize(model, "exact", (torch.randn(2, 3, 32, 32),), measure=False)
    got, expected = trained(fast), trained(copy.deepcopy(model))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got["copies"][0], got["model"], atol=1e-4)
    now = model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
