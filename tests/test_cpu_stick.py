"""Weights taken from what later keys have left, in generated C++: against float64, and where the walk may end early."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_calls import ATTENDS, B, D, Dv, H, M, N, drawn, must_build, said, same, wide
from torch import Tensor

from reattend.codegen.cpu import attend as attending
from reattend.codegen.cpu import attend_backward as backwards
from reattend.codegen.cpu import toolchain as tools
from reattend.compiler.cascades.leftover import leftover
from reattend.compiler.doctor import cpu_flags
from reattend.compiler.primitives import attend as attend_front
from reattend.compiler.primitives.attend import attend
from reattend.compiler.primitives.attend_meaning import attend_meaning
from reattend.compiler.primitives.operator import watched

pytestmark = pytest.mark.skipif(tools.toolchain() is None, reason="no C++ compiler on this machine")
NOTHING_LEFT = -126 * math.log(2)  # from here on what is left is 0 in float32, and its logarithm is not told exactly
KNOWN = {name: how for name, how in ATTENDS.items() if not {"weight", "normaliser", "sink"} & set(how)}
PLACES: dict[str, dict[str, Any]] = KNOWN | {
    "far above": {"score": lambda s: s * 50 + 300, "causal": True},
    "far below": {"score": lambda s: s - 90, "causal": True},
    "a factor afterwards": {"after": lambda w, i, j: w * (i - j + 1.0), "causal": True},
}


@pytest.fixture(autouse=True)
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    must_build(monkeypatch, attending)
    must_build(monkeypatch, backwards)


def call(monkeypatch: pytest.MonkeyPatch, ports: tuple[Tensor, ...], **how: Any) -> tuple[Any, str]:
    q, k, v = ports
    return said(monkeypatch, attend_front, "attend_op", lambda: attend(q, k, v, normaliser="stick", **how))


def alike(found: list[Tensor], expected: list[Tensor], tolerance: float = 2e-6) -> None:
    """o and log left: below what float32 can say of it the logarithm has only to lie there too."""
    same(found[:1], expected[:1], tolerance)
    for a, b in zip(found[1:], expected[1:], strict=True):
        gone = b <= NOTHING_LEFT + 1e-3
        assert bool((a[gone] <= NOTHING_LEFT + 2e-3).all()) and bool((a[gone] >= b[gone] - 1e-2).all())
        same([torch.where(gone, 0.0, a)], [torch.where(gone, 0.0, b)], tolerance)


ASKED = [(name, ("o",)) for name in PLACES]
ASKED += [
    (name, ("o", "lse")) for name in ("full", "causal", "rows without a key", "documents", "two segments", "tiles")
]


@pytest.mark.parametrize(("name", "outputs"), ASKED)
def test_values(name: str, outputs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    ports = drawn(B, H, N, D), drawn(B, M, 2, D).transpose(1, 2), drawn(B, 2, M, Dv)
    groups, text = call(monkeypatch, ports, **(PLACES[name] | {"outputs": outputs}))
    assert attending.refuses(groups, text) is None
    alike(attending.run(groups, text), attend_meaning(wide(groups), text))


HALVES = [pytest.param("emulated", marks=pytest.mark.slow), *(["dots"] if "avx512_bf16" in cpu_flags() else [])]


@pytest.mark.parametrize("halves", ["", *HALVES])
@pytest.mark.parametrize("name", ["causal", "window", "gathered rows", "two segments", "far below"])
def test_bfloat16(name: str, halves: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ports = drawn(B, H, N, D), drawn(B, M, 2, D).transpose(1, 2), drawn(B, 2, M, Dv)
    groups, text = call(monkeypatch, tuple(t.bfloat16() for t in ports), **PLACES[name])
    groups = [groups[0], [t.bfloat16() for t in groups[1]], groups[2]]
    (found,) = attending.run(groups, text, halves=halves)
    assert found.dtype == torch.bfloat16
    same([found], attend_meaning(wide(groups), text), 8e-3)  # a rounding of the weights and one of the output


@pytest.mark.parametrize("sizes", [(1, 1, 8, 8), (1, 300, 64, 64), (49, 7, 7, 5), (129, 128, 33, 16), (0, 5, 8, 8)])
def test_sizes(sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    n, m, d, dv = sizes
    ports = drawn(1, 6, n, d), drawn(1, 3, m, d), drawn(1, 3, dv, m).mT
    groups, text = call(monkeypatch, ports, causal=True, align="end", outputs=("o", "lse"))
    found = attending.run(groups, text)
    assert found[0].shape == (1, 6, n, dv)
    if n:
        alike(found, attend_meaning(wide(groups), text))


def rows(m: int, scores: Callable[[Tensor], Tensor], n: int = 3) -> tuple[Tensor, ...]:
    """q, k, v of one channel each whose scores over m keys are the given function of a key's place."""
    place = torch.arange(m)
    return torch.ones(1, 1, n, 1), scores(place).float().view(1, 1, m, 1), torch.randn(1, 1, m, 1)


TAKES: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing, and one key all of it": lambda j: torch.where(j == 70, 60.0, -60.0),
    "nothing at all": lambda j: -300.0 + 0 * j,
    "little by little": lambda j: -6.0 + 0 * j,
    "nothing, and in the end": lambda j: torch.where(j < 40, 1.0, -40.0),
    "all but the last bits, again and again": lambda j: torch.where(j % 500 == 0, 12.0, -50.0),
}


@pytest.mark.parametrize("name", TAKES)
def test_no_key_that_counts_is_left_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ports = rows(4000, TAKES[name])
    for lse in ((), ("lse",)):
        groups, text = call(monkeypatch, ports, causal=True, align="end", scale=1.0, outputs=("o", *lse))
        alike(attending.run(groups, text), attend_meaning(wide(groups), text))


@pytest.mark.parametrize("few", [0.0, 1e-20])
def test_values_far_back_may_be_of_any_size(few: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty keys leave 2 ** -57 of a row and have values of nearly nothing: what is left counts, times 1e18."""
    q, k, v = rows(3000, lambda j: torch.where(j >= 2960, 0.5, -12.0), n=400)
    v = torch.where(torch.arange(3000).view(1, 1, -1, 1) >= 2500, few * v.abs(), 1e18 * v.abs())
    groups, text = call(monkeypatch, (q, k, v), scale=1.0)
    (found,), (expected,) = attending.run(groups, text), attend_meaning(wide(groups), text)
    assert float(expected.abs().max()) > 1e-3
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=0.0)


@pytest.mark.parametrize(("lse", "n"), [(False, 1), (False, 400), (True, 400)])
def test_what_cannot_count_is_not_visited(lse: bool, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of no number: nobody looks at them, as if a mask hid them; nearer ones are not hidden."""
    q, k, v = drawn(1, 2, n, 16), drawn(1, 2, 2000, 16), drawn(1, 2, 2000, 16)
    outputs = ("o", "lse") if lse else ("o",)
    groups, text = call(monkeypatch, (q, k, v), causal=True, align="end", outputs=outputs)
    expected = attend_meaning(wide(groups), text)
    k[:, :, :64], v[:, :, :64] = math.nan, math.inf
    alike(attending.run(groups, text), expected)
    k[:, :, 2000 - n - 1] = math.nan
    assert bool(attending.run(groups, text)[0][:, :, 0].isnan().all())


def test_tiles_are_made_once_for_heads_that_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for n in (1, 200):
        ports = drawn(2, 6, n, 16), drawn(2, 1, 900, 16), drawn(2, 1, 900, 16)
        groups, text = call(monkeypatch, ports, causal=True, align="end", score=lambda s: s - 5)
        expected = attend_meaning(wide(groups), text)
        for _ in range(10):
            alike(attending.run(groups, text), expected)


def test_decoding_takes_the_kernel() -> None:
    q, k, v = drawn(1, 8, 1, 16), drawn(1, 4, 4096, 16), drawn(1, 4, 4096, 16)
    with watched() as ran:
        o = attend(q, k, v, normaliser="stick", causal=True, align="end")
    assert [c.kernel for c in ran] == ["generated C++"]
    expected = attend(q.double(), k.double(), v.double(), normaliser="stick", causal=True, align="end")
    same([o], [expected], 2e-6)


LEARNED = ("full", "causal", "causal at the end", "window", "both sides", "softcap", "alibi", "documents",
           "mod and div", "functions", "rows without a key", "tiles",
           "tiles of no whole vector", "far below")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "outputs"),
    [*((name, ("o", "lse")) for name in LEARNED), ("full", ("o",)), ("causal", ("o",)), ("window", ("lse",))],
)
def test_gradients(name: str, outputs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    ports = drawn(B, H, N, D), drawn(B, M, 2, D).transpose(1, 2), drawn(B, 2, M, Dv)
    groups, text = call(monkeypatch, ports, **(PLACES[name] | {"outputs": outputs}))
    same(*learned(groups, text), 5e-6)


def learned(groups: Any, text: str) -> tuple[list[Tensor], list[Tensor]]:
    given = [drawn(*t.shape).to(t.dtype) for t in attend_meaning(groups, text)]
    found = backwards.gradients(groups, text, attending.run(groups, text), dict(enumerate(given)), (0, 1, 2))
    assert found is not None
    leaves = [t.double().requires_grad_() for t in (*groups[0], *groups[1])]
    results = attend_meaning([leaves[:1], leaves[1:], wide(groups)[2]], text)
    total = sum((t * g.double()).sum() for t, g in zip(results, given, strict=True))
    expected = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)  # type: ignore[arg-type]
    return list(found), list(expected)  # type: ignore[arg-type]


def test_gradients_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = tuple(t.bfloat16() for t in (drawn(1, 4, 150, D), drawn(1, 2, 150, D), drawn(1, 2, 150, Dv)))
    groups, text = call(monkeypatch, ports, causal=True)
    same(*learned(groups, text), 4e-3)  # rounded to bfloat16 at the end


@pytest.mark.parametrize("name", TAKES)
def test_gradients_reach_every_key_that_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, text = call(monkeypatch, rows(2000, TAKES[name]), causal=True, align="end", scale=1.0, outputs=("o", "lse"))
    same(*learned(groups, text), 5e-6)


def test_gradients_are_not_taken_from_keys_that_cannot_count(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = drawn(1, 2, 100, 16), drawn(1, 2, 1000, 16), drawn(1, 2, 1000, 16)
    groups, text = call(monkeypatch, (q, k, v), causal=True, align="end")
    k[:, :, :48] = math.nan
    found = backwards.gradients(groups, text, attending.run(groups, text), {0: torch.ones_like(q)}, (0, 1, 2))
    assert found is not None and all(bool(t.isfinite().all()) for t in found)


def test_whose_weights_what_is_left_bounds() -> None:
    assert leftover('{"score": "s * 2.0", "normaliser": "stick", "keep": "j <= i"}')
    for other in (
        '"normaliser": "none", "weight": "sigmoid(s)"',
        '"normaliser": "sum", "weight": "exp(s)"',
        '"eps": 0.0',
    ):
        assert not leftover(f'{{"score": "s", {other}}}')
