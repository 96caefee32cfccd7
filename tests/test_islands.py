"""A model that cannot be captured whole keeps its own forward around hosted parts."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig

import reattend
from reattend.compiler import whole_or_islands
from reattend.compiler.capture import Captured, capture
from reattend.compiler.fidelity import against_model
from reattend.compiler.hosting import hosting, is_hosted
from reattend.compiler.islands import capture_islands, host_islands
from reattend.compiler.refusal import Refused
from reattend.compiler.signature import Call, forward_signature


class Early(nn.Module):
    """Leaves its second layer out where the first one's answer is small."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True) for _ in range(2))
        self.head = nn.Sequential(nn.Linear(16, 4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        if x.abs().mean().item() > 0.1:
            x = self.layers[1](x)
        return self.head(x)


def attends(captured: Captured) -> tuple[str, ...] | None:
    found = any("scaled_dot_product_attention" in str(n.target) for n in captured.graph.graph.nodes)
    return None if found else ()


def identity(path: str):  # type: ignore[no-untyped-def]
    def program_for(model: nn.Module, call: Call) -> Captured:
        return capture(model, call.args, call.kwargs)

    return program_for


def test_the_parts_that_can_be_captured_are_found_and_hosted() -> None:
    model = Early().eval()
    x = torch.randn(2, 5, 16)
    with pytest.raises(Refused, match="in forward"):
        capture(model, (x,))
    found = capture_islands(model, (x,), {}, attends).found
    assert list(found) == ["layers.0", "layers.1"]
    assert found["layers.0"].notes[-1] == "captured as an island at layers.0"
    fast = host_islands(model, list(found), identity)
    assert type(fast) is Early and is_hosted(fast.layers[0]) and not is_hosted(model.layers[0])
    for batch in (2, 3):
        y = torch.randn(batch, 7, 16)
        torch.testing.assert_close(fast(y), model(y))
    assert list(fast.state_dict()) == list(model.state_dict())


def test_nothing_to_capture_is_refused() -> None:
    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum() > 0 else x

    model = nn.Sequential(nn.Sequential(Counts(), nn.ReLU()))
    assert not capture_islands(model, (torch.randn(2, 3),), {}, attends).found
    with pytest.raises(Refused, match="no part of it can be captured"):
        reattend.optimize(model, "exact", (torch.randn(2, 3),), measure=False)


class Asking(nn.Module):
    """A layer that asks for a value, in a model that hands it none: neither it nor its like can be captured."""

    def __init__(self, layer_idx: int, width: int = 8) -> None:
        super().__init__()
        self.layer_idx, self.linear = layer_idx, nn.Linear(8, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y if y.sum() > 0 else -y


@pytest.mark.parametrize(("widths", "tried"), [((8, 8, 8, 8), 1), ((8, 8, 8, 4), 2)])
def test_layers_alike_are_tried_once_and_a_question_of_values_at_one_size(
    widths: tuple[int, ...], tried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported: list[str] = []
    capture_module = sys.modules[capture.__module__]
    own = capture_module.export

    def export(model: nn.Module, *rest: Any) -> Captured:
        exported.append(type(model).__name__)
        return own(model, *rest)

    monkeypatch.setattr(capture_module, "export", export)
    layers = nn.Sequential(*(Asking(k, width) for k, width in enumerate(widths)))
    islands = capture_islands(nn.Sequential(layers), (torch.randn(2, 8),), {}, attends)
    assert list(islands.refused) == ["0", "0.0", "0.1", "0.2", "0.3"] and "Could not guard" in islands.refused["0.3"]
    assert exported.count("Asking") == tried and exported.count("Sequential") == 1


class Chunks(nn.Module):
    """Something near attention, behind a question of values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(16, 16), nn.Softmax(-1), nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y if y.sum() > 0 else -y


def test_what_comes_near_in_a_part_is_said_before_what_cannot_be_captured() -> None:
    with pytest.raises(Refused, match=r"no attention found in what can be captured of it .inner.1: no product of q"):
        reattend.optimize(Chunks(), "exact", (torch.randn(2, 5, 16),), measure=False)


class Mixed(nn.Module):
    """One layer that attends, two that ask for a value, two that only come near."""

    def __init__(self) -> None:
        super().__init__()
        self.attends = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.asks = nn.ModuleList(Asked() for _ in range(2))
        self.near = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Softmax(-1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.attends, *self.asks, *self.near):
            x = layer(x)
        y: Tensor = x
        return y if y.sum() > -1e9 else -y


class Asked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y if y.sum() > 0 else -y


def test_parts_beside_islands_are_accounted_for() -> None:
    model, x = Mixed().eval(), torch.randn(2, 5, 16)
    explained = reattend.explain(model, (x,))
    report = reattend.optimize(model, "exact", (x,), measure=False).report
    assert [site.path for site in explained.sites] == ["attends.self_attn"]
    for misses, notes in ((explained.misses, explained.notes), (report.misses, report.notes)):
        assert [m.partition(":")[0] for m in misses] == ["near.0.1", "near.1.1"]
        assert notes[0].startswith("captured in 1 islands, not whole: Mixed: ")
        assert notes[1].startswith("left as it is: asks.0, asks.1: Could not guard on data-dependent expression")


def test_without_islands_explain_gives_the_whole_account() -> None:
    model, x = Mixed().eval(), torch.randn(2, 5, 16)
    model.attends = nn.Identity()
    explained = reattend.explain(model, (x,))
    assert (
        not explained.sites and not reattend.sites(model, (x,)) and "near.1.1: no product of queries" in str(explained)
    )
    assert explained.notes[0].startswith("not captured whole, and no part of it attends: Mixed: ")
    assert explained.notes[1].startswith("left as it is: asks.0, asks.1: ")


def test_islands_take_as_many_signatures_as_asked() -> None:
    fast = reattend.optimize(Early().eval(), "exact", (torch.randn(2, 5, 16),), measure=False, max_signatures=3)
    assert hosting(fast.layers[0]).limit == 3


class Shortens(nn.Module):
    """Takes another mask while it is traced, as some do that leave one out where they can look at it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        hidden = torch.zeros(n, n, dtype=torch.bool, device=x.device)
        if not torch.compiler.is_exporting():
            hidden = torch.ones_like(hidden).triu(1)
        return self.layer(x, hidden)


def test_a_graph_that_is_not_the_model_gives_way_to_islands_that_are() -> None:
    model, x = nn.Sequential(Shortens(), nn.Linear(16, 16)).eval(), torch.randn(2, 7, 16)
    fast = reattend.optimize(model, "exact", x, measure=False)
    assert "captured in 1 islands, not whole" in fast.report.notes[0] and not fast.report.warnings
    for y in (x, torch.randn(3, 9, 16)):
        torch.testing.assert_close(fast(y), model(y), rtol=0, atol=1e-5)


def test_where_no_island_is_the_model_the_whole_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(Shortens(), nn.Linear(16, 16)).eval(), torch.randn(2, 7, 16)
    monkeypatch.setattr(whole_or_islands, "attending_islands", none_found)
    fast = reattend.optimize(model, "exact", x, measure=False)
    assert any("the captured graph is not the model" in warning for warning in fast.report.warnings)
    assert any("not in islands either: no parts" in note for note in fast.report.notes)


def none_found(*given: object) -> dict[str, Captured]:
    raise Refused("no parts")


class Caching(nn.Module):
    """Attention that adds to its own layer of a cache which all layers are given."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor, past_key_values: Any, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        k, v = past_key_values.update(k, v, self.place)
        o = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        y: Tensor = x + self.out(o.transpose(1, 2).flatten(2))
        return y


class ShortensWithCache(nn.Module):
    """Takes another mask while it is traced, and makes a cache of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Caching(place) for place in range(3))

    def forward(self, x: Tensor, past_key_values: Any = None) -> tuple[Tensor, Any]:
        if past_key_values is None:
            past_key_values = DynamicCache(config=LlamaConfig(num_hidden_layers=3))
        rows, before = x.shape[1], past_key_values.get_seq_length()
        mask = torch.ones(rows, before + rows).tril(before).bool() if torch.compiler.is_exporting() else None
        for layer in self.layers:
            x = layer(x, past_key_values, mask)
        return x, past_key_values


def test_islands_grow_their_own_layers_of_a_cache() -> None:
    model, prompt = ShortensWithCache().eval(), torch.randn(2, 7, 16)
    fast = reattend.optimize(model, "exact", prompt, measure=False)
    assert "captured in 3 islands, not whole" in fast.report.notes[0] and not fast.report.warnings
    (wanted, theirs), (found, ours) = model(prompt), fast(prompt)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    for length in (4, 1, 1):
        more = torch.randn(2, length, 16)
        torch.testing.assert_close(fast(more, ours)[0], model(more, theirs)[0], rtol=0, atol=1e-5)
    assert [layer.keys.shape[2] for layer in ours.layers] == [13, 13, 13]


def test_a_part_that_is_given_a_cache_is_compared_with_the_model_as_well() -> None:
    model, prompt = ShortensWithCache().eval(), torch.randn(2, 7, 16)
    given = DynamicCache(config=LlamaConfig(num_hidden_layers=3))
    call = Call.of(forward_signature(model), (prompt, given))
    apart = against_model(model, capture(model, (prompt, given)), call)
    assert apart is not None and apart.max_abs > 1e-3
    assert given.get_seq_length() == 0
