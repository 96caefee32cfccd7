"""What models of families that nobody had in mind do, each on the smallest module that does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, Lfm2Config, LlamaConfig
from transformers.utils import ModelOutput

import reattend


class ByTheSample(nn.Module):
    """Makes queries for each sample in turn: as many samples as there were while it was traced (RT-DETR)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.queries = nn.Parameter(torch.randn(5, 16))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(torch.stack([self.queries + row.mean() for row in x]))
        return y


def test_a_batch_of_one_that_a_model_fixes_is_captured_as_one() -> None:
    model = ByTheSample().eval()
    for batch in (1, 2):
        x = torch.randn(batch, 3, 16)
        fast = reattend.optimize(model, "exact", x, measure=False)
        assert any(f"batch static (x dim 0 = {batch})" in note for note in fast.report.notes)
        for other in (x, torch.randn(3, 3, 16)):
            torch.testing.assert_close(fast(other), model(other), rtol=0, atol=1e-5)


class Hybrid(nn.Module):
    """A layer that attends beside one that keeps a state of another kind, in one cache (Bamba, Qwen3-Next, LFM2)."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Lfm2Config(layer_types=["conv", "full_attention"], num_hidden_layers=2)
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor, past_key_values: DynamicCache | None = None) -> dict[str, Any]:
        if past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        x = x + past_key_values.update_conv_state(x.mT[..., -3:], 0).mean()
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        k, v = past_key_values.update(k, v, 1)
        o = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1)
        return {"o": o.transpose(1, 2).flatten(2), "past_key_values": past_key_values}


def test_a_state_of_another_kind_is_given_and_not_taken() -> None:
    model, x = Hybrid().eval(), torch.randn(2, 7, 16)
    fast = reattend.optimize(model, "exact", x, measure=False)
    for given in (x, torch.randn(3, 9, 16)):
        wanted, found = model(given), fast(given)
        torch.testing.assert_close(found["o"], wanted["o"], rtol=0, atol=1e-5)
        ours, theirs = found["past_key_values"].layers, wanted["past_key_values"].layers
        assert [type(layer) for layer in ours] == [type(layer) for layer in theirs]
        torch.testing.assert_close(ours[0].conv_states[0], theirs[0].conv_states[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(ours[1].keys, theirs[1].keys, rtol=0, atol=1e-5)
    with pytest.raises(reattend.Refused, match="layers.0: a cache layer LinearAttentionLayer: DynamicCache, whose"):
        fast(x[:, :1], found["past_key_values"])


class Normed(nn.Module):
    """Batch statistics in front of attention (LeViT, MobileNetV4)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(16), nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(self.norm(x.mT).mT)
        return y


@pytest.mark.parametrize("recipe", ["exact", "sigmoid"])
@pytest.mark.parametrize("training", [True, False])
def test_checking_a_rewrite_leaves_batch_statistics_alone(recipe: str, training: bool) -> None:
    model, x = Normed().train(training), torch.randn(2, 5, 16)
    fast = reattend.optimize(model, recipe, x, measure=False)
    for name, buffer in fast.norm.named_buffers():
        assert torch.equal(buffer, model.norm.get_buffer(name)), name
    model.train(), fast.train()
    model(x), fast(x)
    for name, buffer in fast.norm.named_buffers():
        torch.testing.assert_close(buffer, model.norm.get_buffer(name))
    assert fast.norm.num_batches_tracked == 1


class Asks(nn.Module):
    """Cannot be captured whole: it is run to find its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Normed()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y if y.sum().item() > -1e9 else -y


def test_finding_parts_in_train_leaves_batch_statistics_alone() -> None:
    model, x = Asks().train(), torch.randn(2, 5, 16)
    fast = reattend.optimize(model, "exact", x, measure=False)
    assert model.inner.norm.num_batches_tracked == fast.inner.norm.num_batches_tracked == 0
    assert torch.equal(model.inner.norm.running_mean, torch.zeros(16))


@dataclass
class Named(ModelOutput):
    first: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    last: Tensor | None = None


class AddsToItsOutput(nn.Module):
    """What was recorded on the way is put behind what the output was made of (V-JEPA 2, VideoPrism)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)

    def forward(self, x: Tensor) -> Named:
        y = self.layer(x)
        out = Named(first=y, last=y + 1)
        out["hidden_states"] = (x, y)
        out["beside"] = y + 2  # no field of the class
        return out


def test_an_output_keeps_the_order_and_the_names_it_was_filled_in() -> None:
    model, x = AddsToItsOutput().eval(), torch.randn(2, 5, 16)
    found = reattend.optimize(model, "exact", x, measure=False)(x)
    wanted = model(x)
    assert list(found) == list(wanted) == ["first", "last", "hidden_states", "beside"]
    for a, b in zip(found.to_tuple(), wanted.to_tuple(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.beside, wanted.beside, rtol=0, atol=1e-5)


class Shuffles(nn.Module):
    """Leaves tokens out by chance, in eval too (ViT-MAE)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.rand(x.shape[:2]).argsort(1)[:, :4]
        y: Tensor = self.layer(x.gather(1, kept[..., None].expand(-1, -1, 16)))
        return y


def test_a_model_that_draws_is_compared_on_the_same_draws() -> None:
    model, x = Shuffles().eval(), torch.randn(2, 9, 16)
    fast = reattend.optimize(model, "exact", x, measure=False)
    assert [row.status for row in fast.report.rows] == ["rewritten"]


class PlacedInAGrid(nn.Module):
    """Three positions for every token, said before the tokens, over a cache (Qwen2-VL's language model)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, positions: Tensor, past_key_values: DynamicCache, x: Tensor) -> dict[str, Any]:
        turn = positions.expand(3, -1, -1).sum(0)[..., None] * 0.1
        q, k, v = self.qkv(x + turn.sin()).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        k, v = past_key_values.update(k, v, 0)
        i, j = torch.arange(q.shape[2]) + k.shape[2] - q.shape[2], torch.arange(k.shape[2])
        o = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=j <= i[:, None])
        return {"o": o.transpose(1, 2).flatten(2), "past_key_values": past_key_values}


def test_positions_of_three_axes_in_front_do_not_say_the_batch() -> None:
    model = PlacedInAGrid().eval()
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=4, hidden_size=16)
    x, places = torch.randn(2, 9, 16), torch.randint(9, (3, 2, 9))
    caches = DynamicCache(config=config), DynamicCache(config=config)
    fast = reattend.optimize(model, "exact", (places[..., :6], DynamicCache(config=config), x[:, :6]), measure=False)
    for part in (slice(0, 6), slice(6, 7), slice(7, 9)):
        found, wanted = (m(places[..., part], c, x[:, part]) for m, c in zip((fast, model), caches, strict=True))
        torch.testing.assert_close(found["o"], wanted["o"], rtol=0, atol=1e-5)
    assert len(fast.signatures) == 1
