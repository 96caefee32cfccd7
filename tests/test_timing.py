"""Timing: noise is a tie, a clear slowdown a warning, and the interval holds the median as often as it says."""

from __future__ import annotations

import math
import random
import statistics
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reattend.compiler.report import Report
from reattend.compiler.timing import FEWEST, TIE, Timing, interleave, median_interval, timed, timing_of


def loaded_machine(slowdown: float, runs: int, seed: int) -> list[tuple[float, float]]:
    """Seconds of pairs on a machine with other work: both sides jitter, some runs take twice as long."""
    draw = random.Random(seed)

    def took(seconds: float) -> float:
        return seconds * draw.lognormvariate(0.0, 0.15) * (2.0 if draw.random() < 0.2 else 1.0)

    return [(took(0.1), took(0.1 * slowdown)) for _ in range(runs)]


def warns(timing: Timing) -> bool:
    return "slower" in Report("net", "exact", timing=timing).text().partition("warnings")[2]


def test_noise_is_a_tie_and_no_warning() -> None:
    found = [timing_of(loaded_machine(1.0, 15, seed), "") for seed in range(200)]
    assert sum(map(warns, found)) <= 4  # 2.5 % of the intervals lie below the median, fewer below 0.97
    assert sum(t.tie for t in found) >= 185  # 95 % by construction
    of_medians = [Timing(t.before, t.after, t.runs, "") for t in found]
    assert sum(map(warns, of_medians)) > 40  # what the ratio of the two medians alone would have said


def test_a_clear_slowdown_is_a_warning() -> None:
    found = [timing_of(loaded_machine(3.0, 15, seed), "") for seed in range(50)]
    assert all(map(warns, found)) and not any(t.tie for t in found)
    half = [timing_of(loaded_machine(2.0, 15, seed), "") for seed in range(50)]
    assert sum(map(warns, half)) >= 45  # noise as large as the slowdown itself
    assert "SLOWER THAN THE ORIGINAL" in found[0].verdict()


def test_slightly_slower_is_neither_a_tie_nor_a_warning() -> None:
    timing = timing_of([(0.985 + 1e-4 * k, 1.0) for k in range(15)], "")
    assert not timing.tie and not timing.slower and timing.interval[0] > TIE


def test_of_too_few_pairs_nothing_is_concluded() -> None:
    timing = timing_of([(1.0, 2.0)] * (FEWEST - 1), "")
    assert timing.interval == (0.0, math.inf) and timing.tie and not warns(timing)
    assert "too few runs" in timing.verdict()
    assert timing_of([(1.0, 2.0)] * FEWEST, "").slower


@given(st.lists(st.floats(0.1, 10), min_size=FEWEST, max_size=40))
def test_the_interval_is_two_of_the_values_around_the_median(values: list[float]) -> None:
    low, high = median_interval(values)
    assert low in values and high in values and low <= statistics.median(values) <= high


@pytest.mark.parametrize("n", [6, 9, 15, 30])
def test_the_interval_holds_the_median_as_often_as_it_says(n: int) -> None:
    draw = random.Random(n)
    held = 0
    for _ in range(2000):
        low, high = median_interval([draw.lognormvariate(0.0, 1.0) for _ in range(n)])
        held += low <= 1.0 <= high
    assert held / 2000 >= 0.94  # 0.95 less two standard errors


def test_runs_take_turns_in_front_and_pairs_stay_together() -> None:
    order: list[str] = []

    def before() -> None:
        order.append("before")
        time.sleep(0.002)

    took = interleave(before, lambda: order.append("after"), runs=8)
    assert len(took) == 8 and all(a > b for a, b in took)
    assert order[:6] == ["after", "before", "before", "after", "after", "before"]


def test_slow_runs_end_early_and_very_slow_ones_earlier() -> None:
    assert len(interleave(lambda: time.sleep(0.01), lambda: time.sleep(0.01), runs=40, seconds=0.08)) == FEWEST
    assert len(interleave(lambda: time.sleep(0.05), lambda: None, runs=40, seconds=0.01)) < FEWEST


def test_a_model_against_one_that_works_twice() -> None:
    class Twice(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sum(self.inner(x) for _ in range(4))

    linear = torch.nn.Linear(256, 256)
    found = timed(linear, Twice(linear), (torch.randn(256, 256),), {})
    assert found is not None and found.slower and found.sizes == "(256, 256)"
