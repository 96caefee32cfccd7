"""What mechanisms hold at once: nothing of tokens times tokens where they claim less (benchmarks/memory.py has all)."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

import reattend.passes  # noqa: F401 - fills the registry
from reattend.compiler.case import cases
from reattend.compiler.check import variants
from reattend.compiler.functional import attention
from reattend.compiler.mechanism import mechanisms
from reattend.compiler.peak_memory import peak_bytes
from reattend.compiler.primitives import attend_blocks
from reattend.compiler.primitives.attend import attend_op
from reattend.compiler.primitives.attend_meaning import attend_meaning
from reattend.compiler.primitives.attend_spec import AttendSpec


def test_transnext_asks_its_network_about_each_step_once() -> None:
    """96 x 96 tokens and 12 x 12 pooled keys: 2.7 GB inside the network, if it were asked about every pair."""
    q = torch.randn(1, 1, 96 * 96, 8)
    with torch.no_grad():
        assert peak_bytes(lambda: attention(q, q, q, "transnext", grid=(96, 96)), warm=False) < 2**28


def test_attend_without_a_kernel_goes_by_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of `attend` of every mechanism, recorded, in blocks of few rows and whole."""
    calls: list[tuple[Any, str]] = []

    def recorded(groups: Any, text: str) -> list[Tensor]:
        calls.append(([list(group) for group in groups], text))
        return attend_meaning(groups, text)

    kernels = dict(attend_op.kernels)
    attend_op.kernels.clear()
    object.__setattr__(attend_op, "frugal", recorded)
    try:
        for slug in mechanisms():
            for case in islice(cases(variants(slug)[-1], sizes=(33,)), 1):
                case.answer()
    finally:
        object.__setattr__(attend_op, "frugal", attend_blocks.attend_in_blocks)
        attend_op.kernels.update(kernels)
    monkeypatch.setattr(attend_blocks, "AT_ONCE", 5000)
    apart = cut = 0
    for groups, text in calls:
        whole, blocks = attend_meaning(groups, text), attend_blocks.attend_in_blocks(groups, text)
        for a, b in zip(whole, blocks, strict=True):
            assert torch.allclose(a, b, atol=1e-5, rtol=1e-5), text
        apart += attend_blocks._apart(AttendSpec.of(text))
        cut += attend_blocks._ahead(AttendSpec.of(text)) is not None
    assert apart > 0.8 * len(calls) > 20 and cut > 10
