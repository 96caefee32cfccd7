"""Rows moved and merged, against their definitions: merge, group, reduce_kv, route, gather, scatter, a step of scan."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reattend.compiler.primitives.attend import attend
from reattend.compiler.primitives.gather import gather, scatter
from reattend.compiler.primitives.group import group
from reattend.compiler.primitives.merge import merge
from reattend.compiler.primitives.reduce_kv import reduce_kv
from reattend.compiler.primitives.route import route
from reattend.compiler.primitives.scan import scan, step
from reattend.compiler.refusal import Refused
from reattend.compiler.symbols import table

INF = float("inf")


def rows(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32).view(1, 1, -1, 1)


def flat(t: Tensor) -> list[Any]:
    found: list[Any] = t.flatten().tolist()
    return found


# --- merge ---


@pytest.mark.parametrize("cuts", [(0, 9), (0, 4, 9), (0, 1, 1, 5, 9), (0, 3, 6, 9)])
def test_merged_parts_are_one_softmax(cuts: tuple[int, ...]) -> None:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 3)
    whole = attend(q, k, v, keep=lambda i, j: (j <= i) & (i > 0), outputs=("o", "lse"))
    parts = []
    for a, b in pairwise(cuts):
        positions = torch.arange(a, b)
        part = attend(q, k[:, :, a:b], v[:, :, a:b], keep=lambda i, j: (j <= i) & (i > 0), k_positions=positions,
                      outputs=("o", "lse"))  # fmt: skip
        parts.append(part)
    o, lse = merge(parts)
    torch.testing.assert_close(o, whole[0])
    torch.testing.assert_close(lse, whole[1])
    assert o[:, :, 0].eq(0).all() and lse[:, :, 0].eq(-INF).all()


def test_merging_is_associative_and_large_logs_do_not_overflow() -> None:
    parts = [
        (torch.randn(1, 2, 3, 4, dtype=torch.float64), torch.randn(1, 2, 3, dtype=torch.float64) * 400) for _ in "abc"
    ]
    together, apart = merge(parts), merge([merge(parts[1:]), parts[0]])
    for a, b in zip(together, apart, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b)


def test_sums_add_and_divide_once() -> None:
    q, k, v = torch.randn(1, 2, 4, 8), torch.rand(1, 2, 6, 8), torch.randn(1, 2, 6, 3)
    parts = []
    for cut in (slice(0, 2), slice(2, 6)):
        numerator = scan(q.abs(), k[:, :, cut], v[:, :, cut], causal=False)
        parts.append((numerator, (q.abs() @ k[:, :, cut].mT).sum(-1)))
    o, z = merge(parts, by="sum")
    torch.testing.assert_close(o / z[..., None], scan(q.abs(), k, v, causal=False, normaliser="sum"))


# --- group and reduce_kv ---

SIX = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])  # two windows of four over six rows


@pytest.mark.parametrize(
    ("padding", "expected", "held"),
    [
        ("mask", [4, 5, 0, 0], [True, True, False, False]),
        ("zero", [4, 5, 0, 0], [True] * 4),
        ("mirror", [4, 5, 5, 4], [True] * 4),
        ("borrow", [4, 5, 3, 2], [True] * 4),
    ],
)
def test_what_a_slot_beyond_the_rows_holds(padding: str, expected: list[int], held: list[bool]) -> None:
    got, valid = group(rows(0, 1, 2, 3, 4, 5), SIX, padding=padding)
    assert flat(got[0, 0, 0]) == [0, 1, 2, 3]
    assert (flat(got[0, 0, 1]), flat(valid[0, 0, 1])) == (expected, held)
    mean, _ = group(rows(0, 1, 2, 3, 4, 5), SIX, padding=padding, combine="mean")
    assert flat(mean)[1] == sum(expected) / sum(held)
    total, _ = group(rows(0, 1, 2, 3, 4, 5), SIX, padding=padding, combine="sum")
    assert flat(total)[1] == sum(expected)


def test_slots_before_the_first_row() -> None:
    x = rows(0, 1, 2, 3)
    assert flat(group(x, torch.tensor([[-2, -1, 0, 1]]), padding="mirror")[0]) == [1, 0, 0, 1]
    assert flat(group(x, torch.tensor([[-2, -1, 0, 1]]), padding="borrow")[0]) == [2, 3, 0, 1]
    got, held = group(rows(5, 6), torch.tensor([[0, 1, 2, 3]]), padding="borrow")
    assert (flat(got), flat(held)) == ([5, 6, 0, 0], [True, True, False, False])


@given(st.integers(1, 9), st.integers(1, 12))
def test_borrowing_never_takes_a_row_twice(n: int, size: int) -> None:
    index = torch.arange(-(-n // size) * size).view(-1, size)
    got, held = group(torch.arange(n).float().view(1, 1, n, 1), index, padding="borrow")
    for taken, valid in zip(got[0, 0, :, :, 0], held[0, 0], strict=True):
        kept = taken[valid].tolist()
        assert len(set(kept)) == len(kept) == min(size, n)


def test_invalid_rows_count_under_no_policy() -> None:
    x, valid = rows(1, 2, 3, 4), torch.tensor([True, False, True, True])
    for padding in ("mask", "zero", "mirror", "borrow"):
        mean, _ = group(x, torch.tensor([[0, 1], [2, 3]]), valid=valid, combine="mean", padding=padding)
        assert flat(mean) == [1, 3.5]
    lse, held = group(x, torch.tensor([[1, -1], [2, 3]]), valid=valid, combine="lse")
    assert flat(lse)[0] == -INF and flat(held) == [False, True]
    assert flat(lse)[1] == pytest.approx(4.3132617)


def test_reduced_keys_with_their_mass_are_exact_where_keys_are_equal() -> None:
    q, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 7, 5)
    index = torch.tensor([[0, 1, 2], [3, 4, -1], [5, 6, -1]])
    k = torch.randn(2, 2, 3, 8)[:, :, [0, 0, 0, 1, 1, 2, 2]]
    k1, v1, mass = reduce_kv(k, v, index)
    assert flat(mass[0, 0]) == [3, 2, 2]
    got = attend(q, k1, v1, score=lambda s, j: s + table(mass[0, 0].log())[j])
    torch.testing.assert_close(got, attend(q, k, v))


def test_weights_of_reduced_keys() -> None:
    k1, v1, mass = reduce_kv(
        rows(1, 3, 5), rows(2, 4, 9), torch.tensor([[0, 1], [2, -1]]), weights=torch.tensor([1.0, 3, 0])
    )
    assert (flat(k1), flat(v1), flat(mass)) == ([2.5, 0], [3.5, 0], [4, 0])


# --- route, gather, scatter ---


def test_the_lowest_index_is_first_among_equals() -> None:
    indices, values = route(torch.tensor([[1.0, 3, 3, 2], [0, 0, 0, 0], [-INF, 7, -INF, -INF]]), 3)
    assert indices.tolist() == [[1, 2, 3], [0, 1, 2], [1, -1, -1]]
    assert values.tolist() == [[3, 3, 2], [0, 0, 0], [7, -INF, -INF]]


def test_candidates_left_out_and_too_few() -> None:
    indices, values = route(torch.tensor([1.0, 3.0]), 3, valid=torch.tensor([True, False]))
    assert (indices.tolist(), values.tolist()) == ([0, -1, -1], [1, -INF, -INF])


def test_rows_there_and_back() -> None:
    x = rows(1, 2, 3)
    assert flat(gather(x, torch.tensor([2, -1, 0, 7]))) == [3, 0, 1, 0]
    index = torch.tensor([0, 0, -1])
    assert flat(scatter(x, index, rows(10, 20))) == [13, 20]
    assert flat(scatter(x, index, rows(10, 20), reduce="mean")) == [1.5, 20]


@given(st.permutations(range(6)))
def test_a_permutation_and_its_return(order: list[int]) -> None:
    x, index = torch.randn(2, 3, 6, 4), torch.tensor(order)
    assert torch.equal(scatter(gather(x, index), index, torch.zeros_like(x)), x)


def test_halves_are_summed_wide() -> None:
    x = torch.full((1, 1, 4096, 1), 1.0, dtype=torch.float16)
    got = scatter(x, torch.zeros(4096, dtype=torch.long), torch.zeros(1, 1, 1, 1, dtype=torch.float16))
    assert got.item() == 4096  # in steps of a half the sum would stop at 2048


# --- one step of scan ---


@pytest.mark.parametrize("normaliser", ["none", "sum"])
def test_steps_give_what_the_whole_gives(normaliser: str) -> None:
    q, k, v = torch.rand(2, 4, 6, 8), torch.rand(2, 2, 6, 8), torch.randn(2, 2, 6, 3)
    a = torch.rand(2, 4, 6)
    whole = scan(q, k, v, decay=a, normaliser=normaliser)
    state, got = None, []
    for t in range(6):
        now = slice(t, t + 1)
        o, state = step(q[:, :, now], k[:, :, now], v[:, :, now], state, decay=a[..., now], normaliser=normaliser)
        got.append(o)
    torch.testing.assert_close(torch.cat(got, 2), whole)


# --- refusals ---

X, Q = torch.randn(2, 4, 5, 3), torch.randn(2, 4, 1, 3)
REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: merge([]), "merge: no parts: at least one pair"),
    (lambda: merge([(X, X[..., 0])], by="mean"), "by 'mean'"),
    (lambda: merge([(X, X)]), "parts of one shape"),
    (lambda: group(X, torch.zeros(2)), "an index of torch.float32: whole numbers"),
    (lambda: group(X, SIX, padding="miror"), "did you mean 'mirror'?"),
    (lambda: group(X, SIX, combine="max"), "combine 'max'"),
    (lambda: group(X, SIX.expand(3, 2, 4)), "an index of shape (3, 2, 4): 2 dimensions, or (B|1, H|1) before them"),
    (lambda: group(X, SIX, valid=torch.ones(7)), "valid of shape (7,): (N,), (B, N) or (B, H, N), N=5"),
    (lambda: group(X[0], SIX), "(B, H, N, D) of a floating type"),
    (lambda: reduce_kv(X, X[:, :2], SIX), "equal B, H and M"),
    (lambda: reduce_kv(X, X, SIX, weights=torch.ones(5), valid=torch.ones(5)), "one of them"),
    (lambda: route(X, 0), "route: k=0: at least 1"),
    (lambda: route(X.long(), 2), "floats (..., M)"),
    (lambda: route(X, 2, valid=torch.ones(4)), "what broadcasts to (2, 4, 5, 3)"),
    (lambda: gather(X, torch.zeros(2, 3, 4, 5, dtype=torch.long)), "an index of shape (2, 3, 4, 5)"),
    (lambda: scatter(X, torch.arange(5), X, reduce="max"), "reduce 'max'"),
    (lambda: scatter(X, torch.arange(4), X), "as many numbers as rows of x"),
]


@pytest.mark.parametrize(("wrong", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_refused_with_what_would_fit(wrong: Callable[[], Any], says: str) -> None:
    with pytest.raises(Refused) as caught:
        wrong()
    assert says in str(caught.value)
