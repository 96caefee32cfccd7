"""A long call tells on a terminal what it is at, and nothing elsewhere."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tqdm import tqdm

import reattend
from reattend.compiler import stage_line


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_optimize_tells_a_terminal_its_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    said = StringIO()
    shown: Any = lambda **how: tqdm(**how | {"disable": False, "file": said})
    monkeypatch.setattr(stage_line, "tqdm", shown)
    reattend.optimize(Attending().eval(), "exact", (torch.randn(2, 6, 16),))
    stages = ("capturing", "looking for attention", "rewriting and checking", "measuring")
    places = [said.getvalue().find(f"Attending: {stage}") for stage in stages]
    assert min(places) >= 0 and places == sorted(places), said.getvalue()
    assert said.getvalue().endswith("\r")  # the line is gone


def test_nothing_is_said_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    reattend.optimize(Attending().eval(), "exact", (torch.randn(2, 6, 16),))
    assert capsys.readouterr() == ("", "")
