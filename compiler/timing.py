"""Which of two ways to call is faster here: interleaved pairs of runs, and an interval for the ratio of a pair.

Other work on a machine slows both runs of a pair, so that the ratio within pairs is steadier than any time. The
interval holds the median of those ratios with 95 % confidence, whatever their distribution: two order statistics.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .containers import is_cache
from .untouched import unchanged

TIE = 0.97  # of the original's speed: a rewrite counts as slower where the whole interval lies below
RUNS, SECONDS = 15, 4.0  # interleaved pairs at most, as long as they stay within the time
SETTLED = 3  # calls without gradients after which a hosted model runs what it will run from then on
FEWEST = 6  # pairs that an interval of 95 % needs: 1 - 2 * 0.5**6
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Timing:
    """Medians of interleaved runs on this machine, in milliseconds, and the ratio before / after of every pair."""

    before: float
    after: float
    runs: int
    sizes: str
    pairs: tuple[float, ...] = ()

    @property
    def ratio(self) -> float:
        return statistics.median(self.pairs) if self.pairs else self.before / self.after

    @property
    def interval(self) -> tuple[float, float]:
        """Where the ratio lies; without the pairs it is taken at its word, of too few pairs nothing is concluded."""
        return median_interval(self.pairs) if self.pairs else (self.ratio, self.ratio)

    @property
    def slower(self) -> bool:
        return self.interval[1] < TIE

    @property
    def tie(self) -> bool:
        """Equally fast within the noise of the runs."""
        low, high = self.interval
        return low <= 1.0 <= high

    def spread(self) -> str:
        low, high = self.interval
        return "too few runs for an interval" if math.isinf(high) else f"{low:.2f} .. {high:.2f}"

    def verdict(self) -> str:
        if self.tie:
            return f"a tie ({self.ratio:.2f} x, {self.spread()})"
        speed = f"{self.ratio:.2f} x as fast ({self.spread()})"
        return f"{speed}, SLOWER THAN THE ORIGINAL" if self.slower else speed


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Two order statistics between which the median lies: P(fewer than k of n are below it) is binomial.

    >>> median_interval([1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 9.0])
    (1.1, 1.7)
    >>> median_interval([1.0, 2.0])
    (0.0, inf)
    """
    n, tail, k = len(values), 0.0, 0
    while k < n // 2 and tail + math.comb(n, k) * 0.5**n <= (1 - confidence) / 2:
        tail += math.comb(n, k) * 0.5**n
        k += 1
    ordered = sorted(values)
    return (ordered[k - 1], ordered[n - k]) if k else (0.0, math.inf)


def interleave(
    before: Callable[[], Any], after: Callable[[], Any], *, runs: int = RUNS, seconds: float = SECONDS
) -> list[tuple[float, float]]:
    """Seconds of pairs of runs, first the one, then the other in front; one pair warms up and does not count."""
    took: list[tuple[float, float]] = []
    started = time.perf_counter()
    for run in range(runs + 1):
        spent = time.perf_counter() - started
        if spent > seconds and (run > FEWEST or spent > 4 * seconds):
            break
        first, second = (before, after) if run % 2 else (after, before)
        one, other = _seconds(first), _seconds(second)
        if run:
            took.append((one, other) if run % 2 else (other, one))
    return took or [(_seconds(before), _seconds(after))]


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def timing_of(took: Sequence[tuple[float, float]], sizes: str) -> Timing:
    before, after = (1e3 * statistics.median(side) for side in zip(*took))
    return Timing(before, after, len(took), sizes, tuple(a / b for a, b in took))


def timed(
    original: nn.Module,
    fast: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    runs: int = RUNS,
    seconds: float = SECONDS,
) -> Timing | None:
    """The two models on one call; None where the call changes its arguments (a cache)."""
    values = (*args, *kwargs.values())
    if any(is_cache(v) for v in values):
        return None
    with torch.no_grad(), unchanged(original):
        for _ in range(SETTLED):
            fast(*args, **kwargs)
        took = interleave(lambda: original(*args, **kwargs), lambda: fast(*args, **kwargs), runs=runs, seconds=seconds)
    return timing_of(took, " ".join(str(tuple(v.shape)) for v in values if isinstance(v, Tensor)))
