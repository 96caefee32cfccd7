"""Mechanisms that a recipe inserts on the residual stream: no change at the start, then the model written by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reattend

WIDTH, SIDE = 8, 3


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A block of a picture's tokens; `picture`: its residual stream is (B, h, w, C)."""

    def __init__(self, picture: bool = False) -> None:
        super().__init__()
        self.picture = picture
        self.norm, self.attn = nn.LayerNorm(WIDTH), Attention()
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())
        self.cpe = self.lcm = self.norm3 = None  # what a recipe inserts, by hand

    def forward(self, x: Tensor) -> Tensor:
        if self.cpe is not None:
            x = self._on_rows(self.cpe, x)
        x = x + self._on_rows(self.attn, self.norm(x))
        if self.lcm is not None and self.norm3 is not None:
            x = x + self._on_rows(self.lcm, self.norm3(x))
        return x + self.mlp(self.norm2(x))

    def _on_rows(self, module: nn.Module, x: Tensor) -> Tensor:
        rows: Tensor = module(x.flatten(1, -2))
        return rows.view_as(x)


class Blocks(nn.Module):
    def __init__(self, picture: bool = False) -> None:
        super().__init__()
        self.picture, self.stem = picture, nn.Conv2d(3, WIDTH, 1)
        self.layers = nn.ModuleList([Block(picture), Block(picture)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        x = x if self.picture else x.flatten(1, 2)
        for layer in self.layers:
            x = layer(x)
        return x


def inputs(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def recipe(slug: str, match: Any = "*", **more: Any) -> dict[str, Any]:
    return {"version": 1, "sites": [{"match": match, "insert": slug, **more}]}


def stirred(fast: nn.Module) -> dict[str, Tensor]:
    """New tensors away from where they start, by name."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, tensor in fast.new_parameters():  # type: ignore[operator]
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=draw))
    return {n: t for n, t in fast.state_dict().items() if ".reattend." in n}


def by_hand(model: nn.Module, slug: str, own: dict[str, Tensor]) -> nn.Module:
    """The same model with the module written into its blocks, and these tensors in it."""
    made = copy.deepcopy(model)
    for number, layer in enumerate(made.layers):  # type: ignore[arg-type]
        inner = reattend.module(slug, dim=WIDTH, grid=(SIDE, SIDE)).train(model.training)
        setattr(layer, slug, inner)
        layer.norm3 = nn.LayerNorm(WIDTH) if slug == "lcm" else None
        mine = {n.split(f".{slug}.")[1]: t for n, t in own.items() if n.startswith(f"layers.{number}.attn")}
        with torch.no_grad():
            for name in mine:
                part, last = (layer.norm3, name[5:]) if name.startswith("norm_") else (inner.reattend, name)
                getattr(part, last).copy_(mine[name])
    return made


@pytest.mark.parametrize("picture", [False, True], ids=["rows", "picture"])
@pytest.mark.parametrize("slug", ["lcm", "cpe"])
def test_inserted_it_changes_nothing_and_then_what_it_says(slug: str, picture: bool) -> None:
    model, x = Blocks(picture).eval(), inputs()
    fast = reattend.optimize(model, recipe(slug), x, measure=False)
    assert fast.report.verdict().startswith("2 of 2 sites rewritten; output max 0 ")
    torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-6)
    hand = by_hand(model, slug, stirred(fast))
    for seen in (x, inputs(batch=3)):
        torch.testing.assert_close(fast(seen), hand(seen), rtol=1e-5, atol=1e-5)
    assert (fast(x) - model(x)).abs().max() > 1e-2


def test_in_train_statistics_are_of_the_batch_and_kept() -> None:
    model, x = Blocks(), inputs()
    fast = reattend.optimize(model.train(), recipe("lcm"), x, measure=False)
    hand = by_hand(model, "lcm", stirred(fast))
    torch.testing.assert_close(fast(x), hand(x), rtol=1e-5, atol=1e-5)
    kept = fast.state_dict()["layers.0.attn.reattend.lcm.bn_mean"]
    torch.testing.assert_close(kept, hand.layers[0].lcm.reattend.bn_mean)  # type: ignore[union-attr,index]
    assert kept.abs().max() > 0
    torch.testing.assert_close(fast.eval()(x), hand.eval()(x), rtol=1e-5, atol=1e-5)
    fast.train()(x).sum().backward()
    assert all(p.grad is not None for _, p in fast.new_parameters())


def test_beside_another_mechanism_one_layer_alone_and_saved(tmp_path: Path) -> None:
    model, x = Blocks().eval(), inputs()
    lcm = "lcm(kernel=3, bn_eps=1e-05, momentum=0.1)"
    rules = [{"match": {"layer": 1}, "attention": "poolformer", "insert": {"lcm": {"kernel": 3}}}]
    fast = reattend.optimize(model, {"version": 1, "sites": rules}, x, measure=False)
    assert [row.mechanism for row in fast.sites] == ["", f"poolformer(pool_size=3) + {lcm}"]
    plain = reattend.optimize(model, recipe("poolformer", {"layer": 1}) | {
        "sites": [{"match": {"layer": 1}, "attention": "poolformer"}]}, x, measure=False)  # fmt: skip
    torch.testing.assert_close(fast(x), plain(x), rtol=0, atol=1e-6)
    stirred(fast)
    assert (fast(x) - plain(x)).abs().max() > 1e-3
    reattend.save(fast, tmp_path / "kept")
    again = reattend.load(tmp_path / "kept", Blocks().eval())
    torch.testing.assert_close(again(x), fast(x), rtol=0, atol=1e-6)


def test_where_it_has_no_place_the_reason_is_said() -> None:
    model, x = Blocks().eval(), inputs()
    with pytest.raises(reattend.Refused, match="prepbn has no place of its own on the residual stream"):
        reattend.optimize(model, recipe("prepbn"), x, measure=False)
    rows = torch.randn(2, 7, WIDTH)
    with pytest.raises(reattend.Refused, match="no residual addition after the output projection"):
        reattend.optimize(Attention().eval(), recipe("lcm"), rows, measure=False)
    with pytest.raises(reattend.Refused, match="cpe needs the tokens' grid"):
        reattend.optimize(Block().eval(), recipe("cpe"), rows, measure=False)


def test_recovery_trains_it() -> None:
    model, x = Blocks().eval(), inputs()
    fast = reattend.optimize(model, recipe("lcm", attention="poolformer"), x, measure=False)
    data = [(torch.randn(2, 3, SIDE, SIDE),) for _ in range(12)]
    before = fast.state_dict()["layers.0.attn.reattend.lcm.conv2_weight"].clone()
    reattend.recover(fast, data, steps=6, lr=1e-2, progress=False)
    assert not torch.equal(fast.state_dict()["layers.0.attn.reattend.lcm.conv2_weight"], before)


def test_a_model_with_losses_of_its_last_call_is_copied() -> None:
    model, x = Blocks().eval(), inputs()
    fast = reattend.optimize(model, recipe("lcm", heads="moh"), x, measure=False)
    fast(x)
    assert fast.losses() and not copy.deepcopy(fast).losses()
    torch.testing.assert_close(copy.deepcopy(fast)(x), fast(x))
