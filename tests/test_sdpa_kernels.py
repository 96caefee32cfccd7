"""`attend` through fused attention gives what the eager meaning gives, for every mask that it takes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import reattend  # noqa: F401  (registers the kernels)
from reattend import attend, table
from reattend.compiler.primitives.attend import attend_op
from reattend.compiler.primitives.attend_meaning import attend_meaning

PAD = torch.rand(2, 700, generator=torch.Generator().manual_seed(1)) < 0.7
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])

MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"causal": True},
    "window": {"causal": True, "keep": lambda i, j: i - j < 4},
    "window+sinks": {"causal": True, "keep": lambda i, j: (i - j < 4) | (j < 2)},
    "both sides": {"keep": lambda i, j: abs(i - j) < 3},
    "padding": {"keep": lambda b, j: table(PAD)[b, j]},
    "causal padding": {"causal": True, "keep": lambda b, j: table(PAD)[b, j]},
    "alibi": {"causal": True, "score": lambda s, h, i, j: s + table(SLOPES)[h] * (j - i)},
    "strided": {"causal": True, "keep": lambda i, j: (i - j) % 3 == 0},
}
SIZES = [(7, 7, "start"), (300, 300, "start"), (5, 9, "end"), (1, 9, "end"), (9, 5, "start"), (600, 700, "end")]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("n", "m", "align"), SIZES)
def test_same_as_the_meaning(mask: str, n: int, m: int, align: str) -> None:
    q, k, v = torch.randn(2, 4, n, 8), torch.randn(2, 2, m, 8), torch.randn(2, 2, m, 6)
    seen: list[tuple[Any, str]] = []
    original = attend_op.choose
    o = attend(q, k, v, align=align, **MASKS[mask])

    def watched(groups: Any, spec: str) -> Any:
        seen.append((groups, spec))
        return original(groups, spec)

    object.__setattr__(attend_op, "choose", watched)
    try:
        attend(q, k, v, align=align, **MASKS[mask])
    finally:
        object.__setattr__(attend_op, "choose", original)
    groups, spec = seen[0]
    kernel, _ = original(groups, spec)
    assert kernel is not None, "no kernel took it"
    (expected,) = attend_meaning(groups, spec)
    torch.testing.assert_close(o, expected, atol=1e-5, rtol=1e-4)


def test_gradients_come_from_the_kernel_that_ran() -> None:
    q, k, v = (torch.randn(1, 2, 300, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    got = torch.autograd.grad(attend(q, k, v, causal=True, keep=lambda i, j: i - j < 9).square().sum(), (q, k, v))
    kernels = attend_op.kernels.pop("cpu")
    try:
        meant = torch.autograd.grad(attend(q, k, v, causal=True, keep=lambda i, j: i - j < 9).square().sum(), (q, k, v))
    finally:
        attend_op.kernels["cpu"] = kernels
    for a, b in zip(got, meant, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_rows_that_keep_nothing_are_zero() -> None:
    q, k, v = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
    o = attend(q, k, v, keep=lambda i, j: j + 2 <= i)
    assert o[:, :, :2].eq(0).all() and not o[:, :, 2:].eq(0).any()


def test_a_softcap_is_refused_by_name() -> None:
    q = torch.randn(1, 1, 4, 8)
    spec = '{"score":"tanh(s)"}'
    kernel, refused = attend_op.choose([[q], [q, q], []], spec)
    assert kernel is None
    assert ("sdpa", "score tanh(s)") in refused


def test_scores_of_zero_are_the_running_mean() -> None:
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    mean = v.cumsum(2) / torch.arange(1, 10)[:, None]
    torch.testing.assert_close(attend(q, k, v, causal=True, scale=0.0), mean)
