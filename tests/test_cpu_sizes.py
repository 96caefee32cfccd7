"""What heads and sizes alone decide is a table of the generated loops: values and gradients against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_calls import wide
from torch import Tensor

import reattend
from reattend.codegen.cpu.toolchain import toolchain
from reattend.codegen.of_heads import without_sizes
from reattend.codegen.used import calls_of
from reattend.compiler.primitives.attend import Relative, Segment
from reattend.compiler.primitives.attend_meaning import attend_meaning
from reattend.compiler.primitives.operator import watched
from reattend.compiler.symbols import build, table

pytestmark = pytest.mark.skipif(toolchain() is None, reason="no C++ compiler on this machine")
H, N, M, D = 4, 200, 100, 16
SHARES = torch.tensor([0.29, 0.5, 0.07, 1.0], dtype=torch.float64)  # 0.29 * 100: 28 whole ones, 29 in float32
Q, K, V = torch.randn(1, H, N, D), torch.randn(1, 2, M, D), torch.randn(1, 2, M, D)
SPANS = table(SHARES)
CALLS: dict[str, dict[str, Any]] = {
    "spans of heads": {"keep": lambda h, i, j, M: j < build("floor", SPANS[h] * M)},
    "spans behind a query": {"keep": lambda h, i, j, M: (i - j < build("floor", SPANS[h] * M)) & (j <= i)},
    "a size alone": {"keep": lambda i, j, N, M: j * N <= i * M},
    "a question of sizes": {"keep": lambda h, i, j, M: (j <= i) | (SPANS[h] * M > 40)},
    "scores": {"score": lambda s, M: s * build("log", M * 1.0)},
    "weights": {"weight": lambda s: torch.sigmoid(s), "normaliser": "none", "after": lambda w, M: w / M},
    "the last rows": {"keep": lambda h, i, j, M: i - j < build("floor", SPANS[h] * M), "align": "end"},
    "relative": {"relative": [Relative(torch.randn(H, 300, D), lambda i, j, M: i - j + M)]},
}


def attended(q: Tensor, k: Tensor, v: Tensor, how: dict[str, Any]) -> Tensor:
    return reattend.attend(q, k, v, **how)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients(name: str) -> None:
    how = CALLS[name]
    (call,) = calls_of(lambda: attended(Q, K, V, how))
    leaves = [t.clone().requires_grad_() for t in (Q, K, V)]
    with watched() as ran:
        found = attended(*leaves, how)
    assert ran[0].kernel == "generated C++", ran[0].refused
    exact = wide(call.groups)
    same = [exact[0][0].requires_grad_(), exact[1][0].requires_grad_(), exact[1][1].requires_grad_()]
    (expected,) = attend_meaning(exact, call.text)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    up = torch.randn_like(found)
    slopes = torch.autograd.grad(found, leaves, up)
    for a, b in zip(slopes, torch.autograd.grad(expected, same, up.double()), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_a_number_that_is_learned_has_its_gradient() -> None:
    """By the plain meaning: what it was made of is not in the loops."""
    slopes = torch.rand(H, requires_grad=True)
    how = {"score": lambda s, h, M: s * table(slopes)[h] * build("log", M * 1.0)}
    found = torch.autograd.grad(attended(Q, K, V, how).square().sum(), slopes)[0]
    exact = slopes.detach().double().requires_grad_()
    how = {"score": lambda s, h, M: s * table(exact)[h] * build("log", M * 1.0)}
    expected = torch.autograd.grad(attended(Q.double(), K.double(), V.double(), how).square().sum(), exact)[0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_texts_without_sizes_and_several_segments_stay() -> None:
    text = '{"keep":"j <= i","score":"s * t0[h]"}'
    assert without_sizes(text, 1) == (text, ())
    how = {"keep": lambda j, M: j * 2 < M, "segments": [Segment(K, V, keep=lambda j, M: j * 3 < M)]}
    with watched() as ran:
        found = attended(Q, K, V, how)
    assert ran[0].kernel == "" and found.isfinite().all()


def test_spans_that_grow_with_the_sequence_are_in_the_loops() -> None:
    q = torch.randn(1, 8, 600, 16)
    with watched() as ran:
        found = reattend.attention(q, q, q, "moa", causal=True)
    assert ran[-1].kernel == "generated C++"
    exact = reattend.attention(q.double(), q.double(), q.double(), "moa", causal=True)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
