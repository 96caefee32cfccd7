"""The ground every test stands on: offline, seeded, uninitialised memory is NaN, nothing left switched afterwards."""

from __future__ import annotations

import os

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic products on a GPU, where there is one
    "TRITON_INTERPRET": "1",  # Triton reads it once, when it is first imported: its kernels run in Python here
}

import random
from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest
import torch

from reattend.compiler import mechanism as registry
from reattend.models.vision_ops import declare_missing_vision_ops

declare_missing_vision_ops()  # before anything imports torchvision: timm, and the image models of transformers
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
# with it, torch.empty comes filled with NaN: reading what was never written cannot pass
torch.use_deterministic_algorithms(True)
# numbers in doctests read the same everywhere
torch.set_printoptions(precision=4, sci_mode=False, linewidth=120)
np.set_printoptions(precision=4, suppress=True, linewidth=120)
# the same examples in every run: a failure seen once can be seen again
hypothesis.settings.register_profile("reattend", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("reattend")


@pytest.fixture(autouse=True)
def same_start_and_end() -> Iterator[None]:
    """Every test starts from the same seeds and hands grad mode, dtype and threads back as it found them."""
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)  # torch.manual_seed takes 2 ms, for devices that are not there
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)
    before = _switches()
    yield
    after = _switches()
    torch.set_grad_enabled(before["grad mode"])
    torch.set_default_dtype(before["default dtype"])
    assert after == before, f"the test left switches changed: {after}, before: {before}"


@pytest.fixture
def notebook() -> Iterator[None]:
    """What is registered in a test is gone afterwards."""
    before = dict(registry._REGISTRY)
    yield
    registry._REGISTRY.clear()
    registry._REGISTRY.update(before)


def _switches() -> dict[str, bool | int | torch.dtype]:
    return {
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
    }
