"""Few queries meet each tile of keys once: it is made for them alone, and a few rows too many share their block."""

from __future__ import annotations

import pytest
import torch
from kernel_calls import drawn, must_build, said, same, wide

from reattend.codegen.cpu import attend as attending
from reattend.codegen.cpu.toolchain import toolchain
from reattend.compiler.primitives import attend as attend_front
from reattend.compiler.primitives.attend import Segment, attend
from reattend.compiler.primitives.attend_meaning import attend_meaning

pytestmark = pytest.mark.skipif(toolchain() is None, reason="no C++ compiler on this machine")


@pytest.mark.parametrize("halves", ["", "emulated"])
@pytest.mark.parametrize("rows", [1, 48, 49, 56, 57, 104])
def test_several_segments_and_gathered_rows(rows: int, halves: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = drawn(2, 3, rows, 24), drawn(2, 3, 300, 24), drawn(2, 3, 300, 40)
    more = Segment(drawn(2, 3, 150, 24), drawn(2, 3, 150, 40), keep=lambda j: j % 3 > 0)
    kept = torch.randint(-1, 300, (2, 3, 290))
    groups, text = said(monkeypatch, attend_front, "attend_op", lambda: attend(q, k, v, rows=kept, segments=[more]))
    if halves:
        groups = [[t.bfloat16() for t in group] if n < 2 else group for n, group in enumerate(groups)]
    must_build(monkeypatch, attending)
    same(attending.run(groups, text, halves=halves), attend_meaning(wide(groups), text), 8e-3 if halves else 2e-6)


@pytest.mark.parametrize("normaliser", ["softmax", "sum", "none"])
def test_a_row_whose_weights_hardly_weigh(normaliser: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A divisor whose reciprocal is no float divides; one that has one multiplies."""
    q, k, v = drawn(1, 2, 9, 8), drawn(1, 2, 70, 8), drawn(1, 2, 70, 16)
    tiny = {} if normaliser == "softmax" else {"weight": lambda s: torch.exp(s) * 1e-39, "normaliser": normaliser}
    groups, text = said(monkeypatch, attend_front, "attend_op", lambda: attend(q, k, v, outputs=("o", "lse"), **tiny))
    must_build(monkeypatch, attending)
    found, expected = attending.run(groups, text), attend_meaning(wide(groups), text)
    if normaliser != "softmax":  # subnormal weights are 0: nothing is divided by nothing
        assert all(bool(x.isfinite().all()) for x in found[:1])
    else:
        same(found, expected, 2e-6)
