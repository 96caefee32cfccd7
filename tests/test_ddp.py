"""Two processes train one optimized model by DistributedDataParallel: gradients are those of one process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import stack
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import reattend

RECIPES: dict[str, Any] = {
    "linear": "linear",
    "moh": {"version": 1, "sites": [{"match": "*", "heads": {"moh": {"shared_heads": 2, "routed_heads": 1}}}]},
}


def batch() -> Tensor:
    return torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(1))


def optimized(recipe: str) -> Any:
    fast = reattend.optimize(stack(2, causal=False), RECIPES[recipe], (batch(),), measure=False).train()
    with torch.no_grad():  # learned tensors away from where they start, so that all have gradients
        for _, parameter in fast.new_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return fast


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def work(rank: int, folder: str, recipe: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        fast = optimized(recipe)
        model = DistributedDataParallel(fast)
        for _ in range(2):  # the second call asks whether the first left its reducer in order
            model.zero_grad()
            model(batch()[2 * rank : 2 * rank + 2]).square().mean().backward()
        torch.save(gradients(fast), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_two_ranks_have_the_gradients_of_one(recipe: str, tmp_path: Path) -> None:
    links = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [links])])
    try:
        torch.multiprocessing.spawn(work, (str(tmp_path), recipe), nprocs=2)
    finally:
        os.environ["PYTHONPATH"] = links
    one = optimized(recipe)
    one(batch()).square().mean().backward()
    expected = gradients(one)
    assert {name for name, _ in one.new_parameters()} <= expected.keys()
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, atol=1e-6, rtol=1e-4)
