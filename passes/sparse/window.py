"""Sliding window with sinks: a query sees the `sinks` first and `window` last keys (StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...compiler.functional import attention
from ...compiler.live import KEPT
from ...compiler.mechanism import Limit, Mechanism, register
from ...compiler.primitives.attend import attend
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.site import Site


@register("window")
@dataclass(frozen=True)
class Window(Mechanism):
    """o_i = softmax over the keys with i - j < window or j < sinks; a noncausal site looks as far the other way.

    >>> q, k, v = problem(6)
    >>> o = attention(q, k, v, "window", causal=True, window=2, sinks=1)
    >>> near = attention(q[:, :, 5:], k[:, :, [0, 4, 5]], v[:, :, [0, 4, 5]], "softmax")  # what the last query sees
    >>> bool((o[:, :, 5:] - near).abs().max() < 1e-6)
    True
    """

    window: int = 1024
    sinks: int = 4

    part = "core"
    kind = "approximate"
    honours = KEPT
    paper = "arXiv 2309.17453"
    tries = ({}, {"window": 3, "sinks": 1}, {"window": 2, "sinks": 0})
    judged = ({"window": 64, "sinks": 0}, {"window": 256, "sinks": 4})

    def __post_init__(self) -> None:
        if self.window < 1 or self.sinks < 0:
            raise Refused(f"window={self.window}, sinks={self.sinks}", where="window", fits="window >= 1, sinks >= 0")

    def fits(self, site: Site) -> str | None:
        if not site.self_attention:
            return "a window compares positions of queries and keys, this site is cross-attention"
        return None

    def keep(self, i: Any, j: Any) -> Any:
        """Under a causal mask; a noncausal site adds the other side."""
        return (i - j < self.window) | (j < self.sinks)

    def both_sides(self, i: Any, j: Any) -> Any:
        return ((i - j < self.window) & (j - i < self.window)) | (j < self.sinks)

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, keep=self.keep if site.causal else self.both_sides, site=site)

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(7)
        for causal in (True, False):
            yield _whole("window >= n is full attention", Window(7, 0), causal)
            yield _whole("sinks >= n is full attention", Window(1, 7), causal)
        yield Limit("window 1 without sinks sees the token itself", lambda: attention(q, k, v, Window(1, 0)), lambda: v)


def _whole(says: str, window: Window, causal: bool) -> Limit:
    q, k, v = problem(7)
    return Limit(
        f"{says} (causal)" if causal else says,
        lambda: attention(q, k, v, window, causal=causal),
        lambda: attention(q, k, v, "softmax", causal=causal),
    )
