"""Generated Triton means what `attend` means: values and gradients against float64, in Triton's interpreter.

Every feature of a spec once; then combinations, of which each pair of choices occurs; the whole product is slow.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton_interpreter  # noqa: F401 (kernels run in Python)
from kernel_calls import AFTERWARDS, ATTENDS, RELATIVES, B, D, Dv, H, M, N, drawn, said, same, whole, wide
from torch import Tensor

from reattend.codegen.triton import launch, launch_gradient
from reattend.codegen.triton.arguments import kinds
from reattend.codegen.triton.attend import Attend, why_not
from reattend.codegen.triton.attend_gradient import why_no_gradient
from reattend.codegen.triton.folding import Folding
from reattend.compiler.primitives import attend as attend_front
from reattend.compiler.primitives.attend import Segment, Tiles, attend
from reattend.compiler.primitives.attend_meaning import attend_meaning
from reattend.compiler.primitives.attend_spec import AttendSpec
from reattend.compiler.symbols import table

# an interpreted logarithm of 0 is -inf, as on a GPU, and numpy says so
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:overflow:RuntimeWarning",
                                        "ignore:invalid value:RuntimeWarning")  # fmt: skip


def asked(monkeypatch: pytest.MonkeyPatch, q: Tensor, k: Tensor, v: Tensor, how: dict[str, Any]) -> tuple[Any, str]:
    groups, text = said(monkeypatch, attend_front, "attend_op", lambda: attend(q, k, v, **how))
    assert launch.refuses(groups, text) is None
    return groups, text


def tier(name: str) -> Any:
    """Vectors are a processor's: to Triton these tiles are `tiles` once more, which takes seconds."""
    return pytest.param(name, marks=pytest.mark.slow) if name == "tiles of no whole vector" else name


@pytest.mark.parametrize("name", [tier(name) for name in (*ATTENDS, *AFTERWARDS, *RELATIVES)])
def test_attend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = drawn(B, H, N, D), drawn(B, M, 2, D).transpose(1, 2), drawn(B, 2, M, Dv)
    groups, text = asked(monkeypatch, q, k, v, (ATTENDS | AFTERWARDS | RELATIVES)[name])
    same(launch.run(groups, text), attend_meaning(wide(groups), text), 4e-6)


def gradients_agree(groups: Any, text: str, tolerance: float) -> None:
    """Of q, every k and v, and every table that a score looks up, from random gradients of all outputs."""
    wanted = tuple(n for n, t in enumerate(t for group in groups for t in group) if t.is_floating_point())
    exact = wide(groups)
    leaves = [t.requires_grad_() for group in exact for t in group if t.is_floating_point()]
    outputs = attend_meaning(exact, text)
    up = [torch.where(t.isfinite(), drawn(*t.shape), 0.0).to(t.dtype) for t in outputs]
    results = launch.run(groups, text)
    given = {n: g.to(r.dtype) for n, (g, r) in enumerate(zip(up, results, strict=True))}
    found = launch_gradient.gradients(groups, text, results, given, wanted)
    assert found is not None and len(found) == len(leaves)
    total = sum((torch.where(t.isfinite(), t, 0.0) * given[n].double()).sum() for n, t in enumerate(outputs))
    expected = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    same(list(found), list(expected), tolerance)  # type: ignore[arg-type]


LEARNED = ("causal at the end", "window", "softcap", "slopes", "documents", "relu squared", "sigmoid", "moved keys",
           "rows without a key", "sink", "moved queries", "changed afterwards", "a learned sink",
           "a learned weight", "distances", "distances of keys")  # fmt: skip


@pytest.mark.parametrize("name", LEARNED)
def test_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = drawn(1, H, 40, D), drawn(1, 45, 2, D).transpose(1, 2), drawn(1, 2, 45, Dv)
    how = {key: (t[:1, :40] if t.shape[0] == B else t[:45]) if isinstance(t, Tensor) else t
           for key, t in (ATTENDS | AFTERWARDS | RELATIVES)[name].items()}  # fmt: skip
    gradients_agree(*asked(monkeypatch, q, k, v, how), 8e-6)


@pytest.mark.parametrize(("queries", "keys"), [(24, 40), (64, 96)])
def test_gradients_of_listed_tiles(queries: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that a block holds, tiles of several blocks; some listed twice, by no one, or beyond the end."""
    q, k, v = drawn(1, 2, 70, D), drawn(1, 1, 100, D), drawn(1, 1, 100, Dv)
    listed = whole(-1, -(-100 // keys) + 1, 1, 2, -(-70 // queries), 2)
    gradients_agree(*asked(monkeypatch, q, k, v, {"tiles": Tiles(listed, queries, keys), "causal": True}), 8e-6)


PARTS = ("two segments", "two segments, a learned sink", "gathered rows", "gathered by head", "a table of heads")


@pytest.mark.parametrize("names", PARTS)
def test_gradients_of_parts(names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments and gathered keys, each a call of its own under rows that are known."""
    q, k, v = drawn(B, H, 30, D), drawn(B, M, 2, D).transpose(1, 2), drawn(B, 2, M, Dv)
    how: dict[str, Any] = {"align": "end"}
    for name in names.split(", "):
        how |= ATTENDS[name]
    gradients_agree(*asked(monkeypatch, q, k, v, how), 8e-6)


# --- combinations -----------------------------------------------------------------------------------------------------

SLOPES, BIAS, LIMIT = drawn(4) / 9, drawn(4, 200), whole(5, 60, 4)
NORMALISERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax and lse": {"outputs": ("o", "lse")},
    "sink": {"sink": lambda h: h * 0.5 - 1.0},
    "sigmoid": {"weight": torch.sigmoid, "normaliser": "none"},
    "relu squared": {"weight": lambda s: torch.relu(s) ** 2, "normaliser": "sum", "eps": 0.1},
    "stick": {"normaliser": "stick"},
}
MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "keep": lambda i, j: (i - j < 20) | (j < 4)},
    "both sides": {"keep": lambda i, j: abs(i - j) <= 9},
    "blocks": {"keep": lambda i, j: i // 16 == j // 16},
    "every third": {"keep": lambda i, j: (i - j) % 3 == 0},
}
SCORES: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"score": lambda s: torch.tanh(s / 3) * 3},
    "slopes": {"score": lambda s, h, i, j: s + table(SLOPES)[h] * (j - i)},
    "relative bias": {"score": lambda s, h, i, j: s + table(BIAS)[h, i - j + 100]},
}
CHOICES: dict[str, tuple[Any, ...]] = {
    "normaliser": tuple(NORMALISERS),
    "mask": tuple(MASKS),
    "score": tuple(SCORES),
    "group": (1, 2),
    "dim": (16, 32, 60, 64, 128),
    "length": (1, 33, 65),
    "segments": (1, 2),
    "dtype": (torch.float32, torch.bfloat16),
}


def combinations() -> Iterator[tuple[Any, ...]]:
    """Rows in which each pair of choices of two kinds occurs, each row the one of some that covers most new pairs."""
    kinds_ = list(CHOICES)
    draw = torch.Generator().manual_seed(1)
    left = {(a, x, b, y) for a, b in itertools.combinations(range(len(kinds_)), 2)
            for x in CHOICES[kinds_[a]] for y in CHOICES[kinds_[b]]}  # fmt: skip

    def random_row(first: tuple[int, Any, int, Any]) -> tuple[Any, ...]:
        row = [options[int(torch.randint(len(options), (), generator=draw))] for options in CHOICES.values()]
        row[first[0]], row[first[2]] = first[1], first[3]
        return tuple(row)

    def pairs(row: tuple[Any, ...]) -> set[tuple[int, Any, int, Any]]:
        return {(a, row[a], b, row[b]) for a, b in itertools.combinations(range(len(row)), 2)}

    while left:
        first = min(left, key=repr)
        best = max((random_row(first) for _ in range(60)), key=lambda row: len(pairs(row) & left))
        left -= pairs(best)
        yield best


def spelled(row: tuple[Any, ...]) -> str:
    return "-".join(str(part).removeprefix("torch.") for part in row)


def asks(row: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    normaliser, mask, score, group, dim, length, segments, dtype = row
    keys = length + 7
    q, k, v = (
        t.to(dtype)
        for t in (drawn(1, 4, length, dim), drawn(1, 4 // group, keys, dim), drawn(1, 4 // group, keys, dim))
    )
    how = {"align": "end", **NORMALISERS[normaliser], **MASKS[mask], **SCORES[score]}
    if segments == 2:
        more = (t.to(dtype) for t in (drawn(1, 4 // group, 20, dim), drawn(1, 4 // group, 20, dim)))
        how["segments"] = [Segment(*more, keep=lambda i, j: j <= i % 7)]
    groups, text = asked(monkeypatch, q, k, v, how)
    rounded = dtype == torch.bfloat16  # a weight is wrong by up to 2 ** -9
    same(launch.run(groups, text), attend_meaning(wide(groups), text), 1e-2 if rounded else 5e-6)
    learned = tuple(n for n, t in enumerate(groups[2]) if t.is_floating_point())
    if why_no_gradient(Attend(text, kinds(groups[2])), learned) is None:
        # of far keys little is left once what later ones have is taken from delta: each score's gradient is wrong by
        # delta * 2 ** -24, and a slope's sums that over all pairs, times their distances; so it sums the 2 ** -9 of
        # bfloat16 weights, and little may be left of the sum itself
        summed = score == "slopes"
        half, single = (5e-2, 3e-4 if normaliser == "stick" else 2e-5) if summed else (2e-2, 2e-5)
        gradients_agree(groups, text, half if rounded else single)


PAIRS = list(combinations())


@pytest.mark.parametrize("row", PAIRS, ids=map(spelled, PAIRS))
def test_combinations(row: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    asks(row, monkeypatch)


PIECES = 240  # of the whole product; each holds every 240th row of it, so that some pieces are a sample of all


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("piece", range(PIECES))
def test_all_combinations(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(itertools.product(*CHOICES.values()))
    torch.manual_seed(piece)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(2)).tolist()
    for row in (rows[place] for place in order[piece::PIECES]):
        with monkeypatch.context() as patch:
            try:
                asks(row, patch)
            except AssertionError as error:
                raise AssertionError(f"{spelled(row)}: {error}") from None


def test_what_cannot_be_said_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not('{"outputs": ["weights"], "score": "s"}') == "outputs weights"
    assert (
        why_not('{"normaliser": "grouped", "leader": "j // 4 * 4", "score": "s"}')
        == "2 passes over the keys: a normaliser that needs one"
    )
    for normaliser, after, reason in (
        ("none", "w + 1.0", "keys without a weight that get one afterwards"),
        ("sum", "w * w + w", "a sum AV[b, h, p, f] = sum[m](W * V): one that changes by factors"),
        ("none", "where(j < 3, w * t0[h], sin(w) / (i + 1.0))", None),
    ):
        said_ = f'{{"weight": "sigmoid(s)", "normaliser": "{normaliser}", "after": "{after}", "score": "s"}}'
        assert why_not(said_) == reason
    for size, reason in ((300, "a head of 300, at most 256"), (0, "no rows")):
        q = drawn(1, 1, 4, size)
        groups, text = said(monkeypatch, attend_front, "attend_op", lambda q=q: attend(q, q, q, scale=1.0))
        assert launch.refuses(groups, text) == reason
    q = drawn(1, 1, 4, 8).double()
    groups, text = said(monkeypatch, attend_front, "attend_op", lambda: attend(q, q, q))
    assert launch.refuses(groups, text) == "torch.float64"


ONE_MASK = ("sigmoid(s)", "relu(s) ** 2", "elu(s) + 1.0", "exp(s)", "where(s < 0, 0.0, s)")
TWO_MASKS = ("tanh(s)", "s", "exp(s) * s", "sigmoid(s) * t0[h]", "sqrt(relu(s))")


@pytest.mark.parametrize("weight", [*ONE_MASK, *TWO_MASKS])
def test_what_weighs_nothing_at_a_score_of_minus_infinity(weight: str) -> None:
    """There one mask is enough; anywhere else weights and their gradients are masked."""
    assert Folding(AttendSpec("s", weight=weight, normaliser="none"), "f").hidden is (weight in ONE_MASK)


@pytest.mark.parametrize("step", [0.02, 0.1, 3.0])
def test_maxima_that_rise_slowly_or_fast(step: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores grow along the keys: by less than what sums are put right for, by more in some tiles, by more in each."""
    q, v = torch.ones(1, 1, 40, 16), drawn(1, 1, 300, 16)
    k = (step / 16 * torch.arange(300.0))[None, None, :, None].expand(1, 1, 300, 16).contiguous()
    groups, text = asked(monkeypatch, q, k, v, {"scale": 1.0, "outputs": ("o", "lse"), "causal": True, "align": "end"})
    # a score of s is wrong by up to s * 2 ** -24, and its weight by as much of itself, rescaled lazily or not
    same(launch.run(groups, text, shares=1), attend_meaning(wide(groups), text), 4e-6 + 300 * step * 2**-22)


def test_only_a_factor_of_one_running_maximum_may_lag_behind() -> None:
    lazy = {text: Folding(AttendSpec.of(text), "", lazily=True).lazy for text in (
        '{"score":"s"}', '{"score":"s","sink":"h"}', '{"score":"s","normaliser":"stick"}',
        '{"score":"s","weight":"sigmoid(s)","normaliser":"none"}', '{"score":"s","normaliser":"none"}')}  # fmt: skip
    assert list(lazy.values()) == ["GM", "", "", "", ""]
    assert "if tl.max" in Attend('{"score":"s"}', lazily=True).source
    assert "if tl.max" not in Attend('{"score":"s","outputs":["lse"]}', lazily=True).source


def test_rows_that_keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q = drawn(1, 2, 40, 16)
    how: dict[str, Any] = {"keep": lambda i, j: j > i + 20, "outputs": ("o", "lse")}
    groups, text = asked(monkeypatch, q, q, q, how)
    o, lse = launch.run(groups, text)
    assert bool((o[:, :, 20:] == 0).all()) and bool((lse[:, :, 20:] == -math.inf).all())


def test_a_source_does_not_change_from_run_to_run() -> None:
    text = '{"keep":"j <= i","score":"s * 0.125"}'
    first, again = Attend(text).source, Attend(text, packed=False).source
    assert first == again and "softmax" not in first
