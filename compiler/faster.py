"""Which of two ways of computing the same is taken: both are timed in turn once, and the numbers must agree.

A machine decides, not a table: how long the same loops take beside torch's differs from processor to processor.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("reattend")
# of the largest number: sums in another order
_APART = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
Way = Callable[..., Any]


class Faster:
    """Remembers for every kind of call whether the second way was right and faster: it has to take less than `worth` of
    the time that the first takes, which with a few turns is beyond the noise.
    """

    def __init__(self, *, worth: float = 0.9, turns: int = 3) -> None:
        self.found: dict[Hashable, bool] = {}
        self.worth, self.turns = worth, turns

    def __call__(self, kind: Hashable, first: Way, second: Way) -> Any:
        """What a call gives; the second way gives None where it cannot."""
        taken = self.found.get(kind)
        if taken is None:
            return self._both(kind, first, second)
        answer = second() if taken else None
        return first() if answer is None else answer

    def _both(self, kind: Hashable, first: Way, second: Way) -> Any:
        expected, got = first(), second()
        self.found[kind] = got is not None and agree(got, expected)
        if got is not None and not self.found[kind]:
            log.warning("a kernel gives other numbers than torch and is not used: %s", kind)
        if self.found[kind]:
            times = [(_seconds(first), _seconds(second)) for _ in range(self.turns)]
            self.found[kind] = min(t for _, t in times) < self.worth * min(t for t, _ in times)
        return expected


def agree(a: Any, b: Any) -> bool:
    """Whether two results, tensors or several of them, differ by rounding alone."""
    if not isinstance(a, Tensor):
        return len(a) == len(b) and all(map(agree, a, b))
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    finite = b.isfinite()
    most = float(b[finite].abs().max()) if bool(finite.any()) else 0.0
    return torch.allclose(a.float(), b.float(), rtol=0.0, atol=most * _APART[b.dtype], equal_nan=True)


def _seconds(way: Way) -> float:
    began = time.perf_counter()
    way()
    return time.perf_counter() - began
