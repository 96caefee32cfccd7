"""`bench`: no speed on a failed check, honest memory, shares of sites, and the same facts as text and JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from small_models import stack
from torch import nn
from typer.testing import CliRunner

import reattend
from reattend import Refused
from reattend.cli import app
from reattend.compiler.bench import measure
from reattend.compiler.peak_memory import peak_bytes
from reattend.compiler.sized import amount, sized

X = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
WINDOW = {"version": 1, "sites": [{"match": "*", "attention": {"window": {"window": 3, "sinks": 1}}}]}


def test_an_exact_recipe_is_measured_and_said() -> None:
    model = stack(2).eval()
    found = reattend.bench(model, "exact", X, runs=7)
    assert found.exact and not found.failed and found.timing is not None and found.timing.runs <= 7
    assert found.deviation.max_abs < 1e-5
    assert found.memory is not None and min(found.memory) > 0
    assert found.share is not None and all(0.2 < s <= 1 for s in found.share)
    assert (found.amount, found.unit) == (18, "tokens")
    assert found.rate is not None and found.rate[0] == pytest.approx(18e3 / found.timing.before)
    text = found.text()
    assert text.splitlines()[0] == found.verdict() and "equal numbers" in found.verdict()
    assert "interleaved" in text and "tokens/s" in text and "torch.profiler" in text and "cores" in text


def test_facts_are_json_and_say_what_the_text_says() -> None:
    found = reattend.bench(stack(1).eval(), WINDOW, X, runs=6)
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["verdict"] == found.verdict() and "another model: relative deviation" in plain["verdict"]
    assert plain["timing"]["runs"] == len(plain["timing"]["pairs"]) and plain["exact"] is False


class Off(nn.Module):
    """A model that says it is exact and is not."""

    def __init__(self, inner: nn.Module, by: float) -> None:
        super().__init__()
        self.inner, self.by = inner, by

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x) + self.by


def test_no_speed_on_a_failed_exact_check(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stack(1).eval()
    found = measure(model, Off(model, 0.01), (X,), {}, model="net", recipe="exact")
    assert "off by 0.01" in found.failed and found.timing is None and found.memory is None
    assert "NOT MEASURED" in found.verdict() and " ms" not in found.text() and "/s" not in found.text()
    assert "max 0.01" in found.text()
    assert not measure(model, Off(model, 0.0), (X,), {}, model="net", recipe="exact", runs=6).failed


def test_peak_memory_is_what_is_held_at_once() -> None:
    x = torch.randn(1000, 250)  # a megabyte

    def chain() -> torch.Tensor:
        y = x + 1
        z = y * 2  # two at once
        del y
        return z + 1

    assert peak_bytes(lambda: x + 1) == pytest.approx(1e6, rel=0.01)
    assert peak_bytes(chain) == pytest.approx(2e6, rel=0.01)
    q = torch.randn(1, 2, 512, 8)
    mask = torch.ones(512, 512, dtype=torch.bool)
    inside = peak_bytes(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask))
    assert inside > 512 * 512 * 4  # the kernel's own float copy of the mask counts


def test_other_sizes_and_types() -> None:
    args, kwargs = sized((torch.arange(6).view(2, 3),), {"mask": torch.ones(2, 3), "flag": True}, batch=3, length=4)
    assert args[0].tolist() == [[0, 1, 2, 0], [3, 4, 5, 3], [0, 1, 2, 0]]
    assert kwargs["mask"].shape == (3, 4) and kwargs["flag"] is True
    assert amount((torch.zeros(2, 3, 8, 8),), {}) == (2, "images")
    with pytest.raises(Refused, match="inputs of tokens"):
        sized((torch.zeros(2, 3, 8, 8),), {}, length=4)
    model = stack(1).eval()
    found = reattend.bench(model, "exact", X, batch=1, length=5, dtype=torch.bfloat16, runs=6)
    assert "bfloat16, (1, 5, 32)" in found.how and not found.failed
    assert next(model.parameters()).dtype is torch.float32


def test_a_model_in_train_is_refused() -> None:
    with pytest.raises(Refused, match="train"):
        reattend.bench(stack(1).train(), "exact", X)


def test_the_command_line_says_the_same() -> None:
    result = CliRunner().invoke(app, ["bench", "nanogpt", "exact", "--runs", "6", "--json"])
    assert result.exit_code == 0, result.output
    assert {"verdict", "timing", "memory", "share", "rate"} <= set(json.loads(result.stdout))
    wrong = CliRunner().invoke(app, ["bench", "nanogpt", "exact", "--dtype", "float8"])
    assert wrong.exit_code == 1 and "bfloat16" in wrong.stderr


@pytest.mark.slow
def test_both_sides_compiled() -> None:
    found = reattend.bench(stack(1).eval(), "exact", X, compiled=True, runs=6)
    assert found.how.startswith("torch.compile") and not found.failed
