"""Derivatives of expressions are those that autograd finds on tensors."""

from __future__ import annotations

import pytest
import torch

from reattend.compiler.refusal import Refused
from reattend.compiler.symbol_eval import evaluate
from reattend.compiler.symbol_slope import slope
from reattend.compiler.symbol_text import parse

TEXTS = (
    "s * 0.125 + 3", "tanh(s * 0.5) * 30.0", "sigmoid(s) * s", "relu(s) ** 2", "softplus(s)", "exp(s) / (1 + exp(s))",
    "abs(s)", "elu(s)", "sqrt(s * s + 1.0)", "sin(s) * cos(s)", "minimum(s, 1.0) * s", "maximum(s, 0.3)",
    "where(s < 0.5, s * s, exp2(s))", "log(s * s + 1)", "floor(s) * s", "(s + i) ** 3", "7.0",
)  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_slope(text: str) -> None:
    s = torch.linspace(-2.3, 2.7, 41, dtype=torch.float64, requires_grad=True)
    value = torch.as_tensor(evaluate(parse(text), {"s": s, "i": 2}, {}), dtype=torch.float64)
    expected = torch.zeros_like(s)
    if value.requires_grad:
        (expected,) = torch.autograd.grad(value.sum(), s)
    found = torch.as_tensor(evaluate(slope(parse(text), "s"), {"s": s.detach(), "i": 2}, {}), dtype=torch.float64)
    torch.testing.assert_close(found.expand(s.shape), expected, atol=1e-12, rtol=0)


def test_what_has_no_derivative_here_is_named() -> None:
    with pytest.raises(Refused, match=r"derivative of `s % 3`"):
        slope(parse("s % 3"), "s")
