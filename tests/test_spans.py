"""Ranges of indices against all pairs: nothing kept is outside of them, nothing in a whole one is left out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reattend.compiler.spans import NOTHING, Reached, Span, spans
from reattend.compiler.symbol_eval import evaluate
from reattend.compiler.symbol_text import parse
from reattend.compiler.symbols import Expr, build

N, TILE = 37, 8
PREDICATES = (
    "True", "j <= i", "(j <= i) & ((i <= j + 7) | (j <= 3))", "abs(i - j) <= 5", "i // 4 == j // 4",
    "(j // 8 <= i // 8) & (i // 8 <= j // 8 + 1)", "(i - j) % 3 == 0", "(j <= 5) | (i <= 5)", "i != j",
    "(j <= i) & (10 <= j) & (i <= 30)", "2 * j <= i", "(j + 3) // 5 <= i // 2", "(i <= j) & (j <= i + 9) | (j == 0)",
)  # fmt: skip


def value(e: Expr, corners: dict[str, int]) -> int:
    return int(torch.as_tensor(evaluate(e, {k: torch.tensor(v) for k, v in corners.items()}, {})))


def inside(span: Span, corners: dict[str, int]) -> range:
    if not value(span.guard, corners):
        return range(0)
    high = N if span.high is None else min(N, value(span.high, corners))
    return range(max(0, value(span.low, corners)), high)


def kept(predicate: Expr) -> torch.Tensor:
    names = {"i": torch.arange(N).view(-1, 1), "j": torch.arange(N).view(1, -1)}
    return torch.as_tensor(evaluate(predicate, names, {})).bool().expand(N, N)


def sound(predicate: Expr, along: str) -> list[Reached]:
    found, pairs = list(spans(predicate, along)), kept(predicate)
    for first in range(0, N, TILE):
        last = min(first + TILE, N) - 1
        corners = {"i0": first, "i1": last} if along == "j" else {"j0": first, "j1": last}
        box = pairs[first : last + 1] if along == "j" else pairs[:, first : last + 1].mT
        some, every = box.any(0), box.all(0)
        reached = {x for r in found for x in inside(r.some, corners)}
        assert {x for x in range(N) if some[x]} <= reached, (predicate, along, first)
        assert all(every[x] for r in found for x in inside(r.every, corners)), (predicate, along, first)
        walked(found, corners, some)
    return found


def walked(found: list[Reached], corners: dict[str, int], some: torch.Tensor) -> None:
    """Tiles in the order of the ranges, each begun where those before have ended: every kept index is met once."""
    met: list[int] = []
    end = 0
    for reached in found:
        span = inside(reached.some, corners)
        low, high = max(span.start // TILE, end), -(-span.stop // TILE) if span else 0
        met += range(low, high)
        end = max(high, low)
    assert len(met) == len(set(met))
    assert {x // TILE for x in range(N) if some[x]} <= set(met)


@pytest.mark.parametrize("along", ["j", "i"])
@pytest.mark.parametrize("text", PREDICATES)
def test_ranges_hold_what_is_kept(text: str, along: str) -> None:
    sound(parse(text), along)


def test_bands_have_a_whole_middle() -> None:
    for text in ("j <= i", "abs(i - j) <= 9", "i // 16 == j // 16"):
        assert all(r.every is not NOTHING for along in "ij" for r in spans(parse(text), along))


def test_a_band_of_keys_ends_for_every_query_that_is_not_a_sinks() -> None:
    (reached,) = spans(parse("(j <= i) & ((i <= j + 7) | (j <= 3))"), "i")
    assert reached.some.high is not None
    assert value(reached.some.high, {"j0": 16, "j1": 23}) == 31
    assert value(reached.some.high, {"j0": 0, "j1": 7}) > 1 << 20


def affine() -> st.SearchStrategy[Expr]:
    texts = st.builds(
        "{0} * i + {1} * j {2} {3}".format,
        st.integers(-2, 2), st.integers(-2, 2), st.sampled_from(["<=", "<", ">=", "==", "!="]), st.integers(-20, 20),
    )  # fmt: skip
    return st.builds(parse, texts)


def predicates() -> st.SearchStrategy[Expr]:
    return st.recursive(affine(), lambda p: st.builds(build, st.sampled_from(["and", "or"]), p, p), max_leaves=4)


@settings(max_examples=60)
@given(predicates(), st.sampled_from("ij"))
def test_random_predicates(predicate: Expr, along: str) -> None:
    sound(predicate, along)
