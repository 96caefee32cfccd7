"""Attends that torch says in one call become that call: where it fits, equal at every size, gradients too."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from small_models import Attend, stack
from torch import Tensor, nn

import reattend
from reattend.codegen.cpu.toolchain import toolchain
from reattend.compiler.primitives.operator import watched

WINDOW = {"version": 1, "sites": [{"match": "*", "attention": {"window": {"window": 3, "sinks": 1}}}]}


class Padded(nn.Module):
    """Two layers that read one padding mask, as a boolean of N x M."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        B, N, _ = x.shape
        keep = (mask != 0)[:, None, None, :].expand(B, 1, N, N)
        for _ in range(2):
            q, k = (f(x).view(B, N, 2, 8).transpose(1, 2) for f in (self.q, self.k))
            x = F.scaled_dot_product_attention(q, k, k, attn_mask=keep).transpose(1, 2).reshape(B, N, 16)
        return x


def targets(fast: torch.nn.Module) -> list[str]:
    return [str(n.target) for n in fast.graph.graph.nodes]


@pytest.mark.parametrize("causal", [True, False])
def test_plain_attends_are_torchs_own_call(causal: bool) -> None:
    model, x = stack(2, causal=causal), torch.randn(2, 9, 32)
    fast = reattend.optimize(model, "exact", x, measure=False)
    assert sum("scaled_dot_product" in t for t in targets(fast)) == 2
    assert not any("reattend" in t for t in targets(fast))
    for n in (9, 5, 1):
        torch.testing.assert_close(fast(x[:, :n]), model(x[:, :n]), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(toolchain() is None, reason="no C++ compiler on this machine")
def test_long_causal_rows_stay_for_generated_code() -> None:
    """There it is ahead of torch's call; the graph that leaves is in plain torch all the same."""
    model, x = stack(1, causal=True), torch.randn(1, 2048, 32)
    fast = reattend.optimize(model, "exact", x, measure=False)
    assert any("reattend.attend" in t for t in targets(fast))
    for n in (2048, 40):
        torch.testing.assert_close(fast(x[:, :n]), model(x[:, :n]), rtol=1e-5, atol=1e-6)


def test_one_row_of_keys_serves_all_layers() -> None:
    torch.manual_seed(0)
    model, x = Padded().eval(), torch.randn(3, 7, 16)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 2 + [0] * 5])
    fast = reattend.optimize(model, "exact", (x, mask), measure=False)
    assert sum("scaled_dot_product" in t for t in targets(fast)) == 2
    assert sum("masked_fill" in t for t in targets(fast)) == 1
    for rows, n in ((3, 7), (2, 5)):
        expected = model(x[:rows, :n], mask[:rows, :n])
        torch.testing.assert_close(fast(x[:rows, :n], mask[:rows, :n]), expected, rtol=1e-5, atol=1e-6)
    empty = fast(x, torch.zeros_like(mask))
    assert torch.equal(empty, torch.zeros_like(empty))  # rows that keep nothing give 0, as attend says


def test_gradients_are_the_originals() -> None:
    model, x = stack(1), torch.randn(2, 6, 32)
    fast = reattend.optimize(model, "exact", x, measure=False)
    given = [x.clone().requires_grad_() for _ in range(2)]
    for one, value in zip((model, fast), given):
        one(value).square().sum().backward()
    torch.testing.assert_close(given[1].grad, given[0].grad, rtol=1e-4, atol=1e-6)


def test_what_one_call_cannot_say_stays_an_attend() -> None:
    fast = reattend.optimize(stack(2), WINDOW, torch.randn(2, 9, 32), measure=False)
    assert sum("reattend.attend" in t for t in targets(fast)) == 2


def test_dropout_stays_in_train_and_goes_in_eval() -> None:
    model = nn.Sequential(Attend(), nn.Dropout(0.5))
    x = torch.randn(2, 6, 32)
    fast = reattend.optimize(model.eval(), "exact", x, measure=False)
    assert not any("dropout" in t for t in targets(fast))
    fast.train()
    fast(x)
    assert any("dropout" in t for t in targets(fast))


class Filled(Padded):
    """The same with a finite fill: a row that keeps nothing averages all values."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        B, N, _ = x.shape
        fill = (mask == 0)[:, None, None, :] * torch.finfo(x.dtype).min
        q, k = (f(x).view(B, N, 2, 8).transpose(1, 2) for f in (self.q, self.k))
        weights = (q @ k.mT * 8**-0.5 + fill).softmax(-1)
        return (weights @ k).transpose(1, 2).reshape(B, N, 16)


def test_rows_that_keep_nothing_have_the_models_own_fill() -> None:
    torch.manual_seed(0)
    model, x = Filled().eval(), torch.randn(3, 7, 16)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [0] * 7])
    fast = reattend.optimize(model, "exact", (x, torch.ones_like(mask)), measure=False)
    torch.testing.assert_close(fast(x, mask), model(x, mask), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", ["auto", "eager", "cpu"])
def test_a_target_decides_what_computes(target: str) -> None:
    model, x = stack(1, causal=True), torch.randn(1, 512, 32)
    recipe = {"version": 1, "sites": [{"match": "*", "attention": "softmax"}], "target": target}
    fast = reattend.optimize(model, recipe, x, measure=False)
    assert any("scaled_dot_product" in t for t in targets(fast)) == (target == "auto")
    with watched() as ran, torch.no_grad():
        found = fast(x)
    assert [call.kernel for call in ran] == (["generated C++"] if target == "cpu" else [])
    torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-6)
    again = copy.deepcopy(fast).train()
    again(x).sum().backward()
    assert all(p.grad is not None for p in again.parameters())
