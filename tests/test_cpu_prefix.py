"""Prefixes by generated C++: values and gradients against float64, for every monoid, direction and start."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from kernel_calls import drawn, must_build, same, wide
from torch import Tensor

from reattend.codegen.cpu import prefix as walking
from reattend.codegen.cpu import toolchain as tools
from reattend.compiler.primitives.operator import watched
from reattend.compiler.primitives.prefix import prefix, prefix_meaning
from reattend.compiler.primitives.prefix_spec import MONOIDS, PrefixSpec

pytestmark = pytest.mark.skipif(tools.toolchain() is None, reason="no C++ compiler on this machine")

B, H, N = 2, 3, 37
DOCUMENTS = {
    "one document": [],
    "packed": [torch.tensor([5] * 10 + [2] + [7] * 16 + [5] * 10)],
    "packed, each sample its own": [torch.stack((torch.arange(N) // 7, torch.arange(N) // 50))],
}


def _rows(monoid: str, d: int, *, channels: bool = True) -> list[Tensor]:
    x = drawn(B, N, H, d).transpose(1, 2)
    logits = 9 * drawn(B, H, N)
    logits[:, :, :2] = logits[:, :, -1] = logits[0, 0] = -math.inf
    factors = torch.rand(B, H, N, d if channels else 1)
    return {"sum": [x], "max": [x], "affine": [factors, x], "softmax": [logits, x]}[monoid]


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("monoid", MONOIDS)
def test_values_and_gradients(
    monoid: str, documents: str, reverse: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    must_build(monkeypatch, walking)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    tables, text = DOCUMENTS[documents], PrefixSpec(monoid, reverse, "t0" if DOCUMENTS[documents] else "").text
    for d, channels in product((1, 5, 300), (True, False) if monoid == "affine" else (True,)):
        groups: Any = [_rows(monoid, d, channels=channels), tables]
        leaves = [t.requires_grad_() for t in wide(groups)[0]]
        expected = prefix_meaning([leaves, tables], text)
        found = walking.run(groups, text)
        same(found, [t.detach() for t in expected], 1e-6)
        probes = [torch.where(t.isfinite(), drawn(*t.shape), 0.0) for t in expected]
        mine = walking.gradients(groups, text, found, dict(enumerate(probes)), range(len(leaves)))
        if mine is None:
            assert monoid == "max"
            continue
        total = sum((torch.where(t.isfinite(), t, 0.0) * g).sum() for t, g in zip(expected, probes, strict=True))
        theirs = [torch.nan_to_num(g) for g in torch.autograd.grad(total, leaves)]  # type: ignore[arg-type]
        same([t for t in mine if t is not None], theirs, 5e-6)  # as for those of `attend`


@pytest.mark.parametrize("monoid", MONOIDS)
def test_what_is_no_number_stays_none(monoid: str) -> None:
    rows = _rows(monoid, 9)
    rows[-1][0, 1, 5, 3] = math.nan
    rows[-1][1, 1, 7, 8] = math.inf
    text = PrefixSpec(monoid).text
    (mine, *_), (theirs, *_) = walking.run([rows, []], text), prefix_meaning(wide([rows, []]), text)
    torch.testing.assert_close(mine.double(), theirs, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_a_long_sum_of_what_floats_would_lose() -> None:
    x = torch.full((1, 1, 1 << 16, 1), 0.1)
    (y,) = walking.run([[x], []], PrefixSpec("sum").text)
    same([y], [x.double().cumsum(2)], 4e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_and_out(dtype: torch.dtype) -> None:
    logits, v = 5 * drawn(1, 2, 65).to(dtype), drawn(1, 2, 65, 32).to(dtype)
    found, text = walking.run([[logits, v], []], PrefixSpec("softmax").text), PrefixSpec("softmax").text
    assert [t.dtype for t in found] == [dtype, torch.float32]
    same(found, prefix_meaning(wide([[logits, v], []]), text), 8e-3)


def test_large_calls_take_it_and_can_be_trained_through() -> None:
    a, x = torch.rand(1, 2, 400, 32).requires_grad_(), drawn(1, 2, 400, 32).requires_grad_()
    with watched() as ran:
        y = prefix("affine", a, x)
    assert [r.kernel for r in ran] == ["generated C++"]
    wide_a, wide_x = (t.detach().double().requires_grad_() for t in (a, x))
    mine, theirs = y.square().sum(), prefix("affine", wide_a, wide_x).square().sum()
    pairs = zip(torch.autograd.grad(mine, (a, x)), torch.autograd.grad(theirs, (wide_a, wide_x)), strict=True)
    for got, expected in pairs:
        same([got], [expected], 2e-6)
