"""Weights are shared with the original until something writes them, and no way of writing reaches the other side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hosted_models import Net, identity, ids, llama, unchanged, weights
from torch import nn

from reattend.compiler.hosted import host
from reattend.compiler.ownership import share_memory


def test_weights_are_shared_until_written() -> None:
    model = llama()
    before = weights(model)
    fast = host(model, identity)
    assert all(share_memory(p, q) for p, q in zip(fast.parameters(), model.parameters()))
    x = ids(2, 5)
    fast(x)
    assert all(share_memory(p, q) for p, q in zip(fast.parameters(), model.parameters()))  # reading copies nothing
    optimizer = torch.optim.SGD(fast.parameters(), lr=1.0)
    fast(x, labels=x).loss.backward()
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()
    assert not any(share_memory(p, q) for p, q in zip(fast.parameters(), model.parameters()))
    assert unchanged(model, before) and not torch.equal(fast.lm_head.weight, model.lm_head.weight)


def _zero(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()


def _step(model: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=1.0).step()


def _data(model: Any) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # frozen, as PEFT leaves what it later merges into
        parameter.data += 1


def _numpy(model: Any) -> None:
    model.lm_head.weight.detach().numpy()[:] = 0


WAYS: dict[str, Callable[[Any], Any]] = {
    "half": lambda fast: fast.half(),
    "part": lambda fast: fast.model.layers[0].double(),
    "meta": lambda fast: fast.to("meta"),
    "load": lambda fast: fast.load_state_dict({n: torch.zeros_like(t) for n, t in fast.state_dict().items()}),
    "load part": lambda fast: fast.lm_head.load_state_dict({"weight": torch.zeros(60, 32)}),
    "own": lambda fast: (fast.own_weights(), _zero(fast)),
    "in place": _zero,
    "data": _data,
    "init": lambda fast: nn.init.zeros_(fast.lm_head.weight),
    "optimizer": _step,
    "many at once": lambda fast: torch._foreach_mul_([p.data for p in fast.parameters()], 2.0),
    "numpy": _numpy,
    "assigned": lambda fast: fast.load_state_dict(
        {n: torch.zeros_like(t) for n, t in fast.state_dict().items()}, assign=True
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_no_way_of_writing_reaches_the_original(way: str) -> None:
    model = llama()
    before = weights(model)
    fast = host(model, identity)
    WAYS[way](fast)
    assert unchanged(model, before)
    assert not any(p.is_meta for p in model.parameters())
    if way != "meta":
        assert not unchanged(fast, before)


def test_writing_the_original_does_not_reach_the_twin() -> None:
    model = llama()
    before = weights(model)
    fast = host(model, identity)
    _data(model)
    assert unchanged(fast, before) and not unchanged(model, before)


@pytest.mark.parametrize("source", ["mapped file", "numpy"])
def test_memory_that_torch_does_not_own_is_not_written_either(source: str, tmp_path: Path) -> None:
    model = Net().eval()
    if source == "numpy":
        model.first.weight.data = torch.from_numpy(np.random.randn(4, 4).astype("float32"))
    else:
        torch.save(model.state_dict(), tmp_path / "net.pt")
        model.load_state_dict(torch.load(tmp_path / "net.pt", mmap=True), assign=True)
    before = weights(model)
    fast = host(model, identity)
    _data(fast)
    assert unchanged(model, before) and not unchanged(fast, before)
