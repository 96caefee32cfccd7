"""A model that cannot be captured whole keeps its own forward around hosted parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from reattend.compiler.capture import Captured, capture
from reattend.compiler.hosted import is_hosted
from reattend.compiler.islands import capture_islands, host_islands
from reattend.compiler.refusal import Refused
from reattend.compiler.signature import Call


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


def attends(captured: Captured) -> bool:
    return any("scaled_dot_product_attention" in str(n.target) for n in captured.graph.graph.nodes)


def identity(path: str):  # type: ignore[no-untyped-def]
    def program_for(model: nn.Module, call: Call) -> Captured:
        return capture(model, call.args, call.kwargs)

    return program_for


def test_the_parts_that_can_be_captured_are_found_and_hosted() -> None:
    model = Early().eval()
    x = torch.randn(2, 5, 16)
    with pytest.raises(Refused, match="in forward"):
        capture(model, (x,))
    found = capture_islands(model, (x,), {}, attends)
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
    with pytest.raises(Refused, match="no part of it can be captured"):
        capture_islands(model, (torch.randn(2, 3),), {}, attends)
