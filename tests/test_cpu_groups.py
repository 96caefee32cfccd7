"""Softmaxes of two levels in generated C++: groups of every size, in whole tiles and cut ones, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_calls import drawn, must_build, said, same, whole, wide

from reattend.codegen.cpu import attend as attending
from reattend.codegen.cpu import attend_backward as backwards
from reattend.codegen.cpu import toolchain as tools
from reattend.compiler.doctor import cpu_flags
from reattend.compiler.functional import attention
from reattend.compiler.groups_of_keys import even_groups
from reattend.compiler.primitives import attend as attend_front
from reattend.compiler.primitives.attend import Segment, Tiles, attend
from reattend.compiler.primitives.attend_meaning import attend_meaning
from reattend.compiler.primitives.operator import watched
from reattend.compiler.symbols import table

pytestmark = pytest.mark.skipif(tools.toolchain() is None, reason="no C++ compiler on this machine")
B, H, N, M, D, Dv = 2, 4, 211, 300, 24, 40
DOC, SEEN = whole(0, 3, B, M), whole(0, 5, B, M) > 0


@pytest.fixture(autouse=True)
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (attending, backwards):
        must_build(monkeypatch, module)


def last_of(size: int) -> Callable[[Any], Any]:
    return lambda j: j // size * size + size - 1


def landmarks(size: int) -> dict[str, Any]:
    """A query's own block key by key, earlier ones through their last key."""
    last = last_of(size)
    return {
        "keep": lambda i, j: ~((j // size == i // size) & (j == last(j))),
        "leader": lambda i, j: torch.where(j // size == i // size, j, last(j)),
        "causal": True,
        "outputs": ("o", "lse"),
    }


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "at the end": {"align": "end"},
    "all led": {"leader": last_of(3), "keep": None},
    "all led, wide": {"leader": last_of(51), "keep": None, "causal": False},
    "documents": {"keep": lambda b, i, j: table(DOC)[b, i] == table(DOC)[b, j]},
    "hidden keys": {"keep": lambda b, j: table(SEEN)[b, j] != 0},
    "far scores": {"score": lambda s: s * 60},
    "far above": {"score": lambda s: s + 900},
    "far below": {"score": lambda s, j: s - 900 - j % 100},
    "sink": {"sink": lambda h: h * 0.5},
    "a factor afterwards": {"after": lambda w, i, j: w * (i - j + 1.0)},
    "a table of heads": {"kv_heads": torch.tensor([0, 0, 1, 0])},
    "moved queries": {"q_positions": whole(0, M, B, N)},
    "tiles": {"tiles": Tiles(whole(-1, 10, B, 1, 27, 4), 8, 32), "leader": last_of(16), "keep": None},
}
CASES = [(size, "plain") for size in (1, 2, 3, 8, 51, 64, 130, 400)] + [
    (size, f) for f in FEATURES for size in (16, 51)
]


def call(monkeypatch: pytest.MonkeyPatch, kind: torch.dtype, how: dict[str, Any]) -> tuple[Any, str]:
    q, k, v = (t.to(kind) for t in (drawn(B, H, N, D), drawn(B, M, 2, D).transpose(1, 2), drawn(B, 2, M, Dv)))
    return said(monkeypatch, attend_front, "attend_op", lambda: attend(q, k, v, normaliser="grouped", **how))


@pytest.mark.parametrize(("size", "feature"), CASES)
def test_values(size: int, feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, text = call(monkeypatch, torch.float32, landmarks(size) | FEATURES[feature])
    assert attending.refuses(groups, text) is None
    # scores of 300 to 1000 are rounded where a weight of them is e to the difference
    near = 1e-4 if "far" in feature else 2e-6  # float32 says a score of 900 to 6e-5, and so its weight
    same(attending.run(groups, text), attend_meaning(wide(groups), text), near)


HALVES = ["", pytest.param("emulated", marks=pytest.mark.slow), *(["dots"] if "avx512_bf16" in cpu_flags() else [])]


@pytest.mark.parametrize("halves", HALVES)
@pytest.mark.parametrize("size", [3, 16, 51, 64])
def test_bfloat16(size: int, halves: str, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, text = call(monkeypatch, torch.bfloat16, landmarks(size) | {"outputs": ("o",)})
    (found,) = attending.run(groups, text, halves=halves)
    assert found.dtype == torch.bfloat16
    same([found], attend_meaning(wide(groups), text), 8e-3)


@pytest.mark.parametrize("port", range(3))
def test_what_is_no_number_is_not_hidden(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ports = [drawn(1, 2, 200, 16) for _ in range(3)]
    ports[port][0, 1, 37, 5] = math.nan
    how = landmarks(16) | {"outputs": ("o",)}
    groups, text = said(monkeypatch, attend_front, "attend_op", lambda: attend(*ports, normaliser="grouped", **how))
    (found,), (expected,) = attending.run(groups, text), attend_meaning(wide(groups), text)
    assert torch.equal(found.isnan(), expected.isnan()) and bool(expected.isnan().any())


def test_landmark_takes_the_kernel_and_can_be_trained_through() -> None:
    q, k, v = (drawn(1, 2, 400, 16).requires_grad_() for _ in range(3))
    with watched() as ran:
        o = attention(q, k, v, "landmark", causal=True, block_size=64)
    assert [c.kernel for c in ran] == ["generated C++"]
    plain = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected = attention(*plain, "landmark", causal=True, block_size=64)
    same([o], [expected], 2e-6)
    found = torch.autograd.grad(o.square().sum(), (q, k, v))
    same(list(found), list(torch.autograd.grad(expected.square().sum(), plain)), 1e-5)


@pytest.mark.parametrize(("size", "feature"), [case for case in CASES if case[1] != "moved queries"])
def test_gradients(size: int, feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, text = call(monkeypatch, torch.float32, landmarks(size) | FEATURES[feature])
    results = attend_meaning(wide(groups), text)
    given = [torch.where(t.isfinite(), drawn(*t.shape), 0.0) for t in results]
    found = backwards.gradients(groups, text, attending.run(groups, text), dict(enumerate(given)), (0, 1, 2))
    assert found is not None
    leaves = [t.double().requires_grad_() for t in (*groups[0], *groups[1])]
    again = attend_meaning([leaves[:1], leaves[1:], wide(groups)[2]], text)
    total = sum((torch.where(t.isfinite(), t, 0.0) * g.double()).sum() for t, g in zip(again, given, strict=True))
    same(list(found), list(torch.autograd.grad(total, leaves)), 1e-3 if "far" in feature else 5e-6)  # type: ignore[arg-type]


def test_moved_queries_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    groups, text = call(monkeypatch, torch.float32, landmarks(16) | FEATURES["moved queries"] | {"outputs": ("o",)})
    assert backwards.gradients(groups, text, attending.run(groups, text), {0: drawn(B, H, N, Dv)}, (0, 1, 2)) is None


def test_which_leaders_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert even_groups("j // 8 * 8 + 7") and even_groups("where(j // 8 == i // 8, j, j // 8 * 8 + 7)")
    for other in ("j // 8 * 8 + 6", "j // 8 * 9 + 7", "j", "i", "t0[b, j]", "where(j < 3, i, j // 8 * 8 + 7)"):
        assert (found := even_groups(other)) is None or found.size == 1, other
    more = {"segments": [Segment(drawn(B, 2, 5, D), drawn(B, 2, 5, Dv))]}
    cut = {"tiles": Tiles(whole(-1, 10, B, 1, 27, 4), 8, 24)}
    for how, reason in (
        (landmarks(16) | more, "groups over several segments"),
        (landmarks(16) | cut, "tiles of 24 keys, which cut groups of 16"),
        (landmarks(600), "groups of 600 keys, at most 512"),
        (
            landmarks(16) | {"leader": lambda j: j // 8 * 8},
            "groups that are not blocks of one size with their last key for",
        ),
    ):
        groups, text = call(monkeypatch, torch.float32, how)
        assert str(attending.refuses(groups, text)).startswith(reason)
