"""LS attention: most heads see a short window, a few see everything (Long Short-attention, arXiv 2505.15548)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...compiler.functional import attention
from ...compiler.live import KEPT
from ...compiler.mechanism import Limit, Mechanism, register
from ...compiler.primitives.attend import attend
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.site import Site
from ...compiler.symbols import table


@register("ls")
@dataclass(frozen=True)
class LS(Mechanism):
    """Long heads see all keys, the others those with |i - j| < local_window (causal: of these j <= i).

    The long heads are the last n_long ones, or those that long_heads names (then n_long is their number). The paper's
    own numbers and head sizes are not public: heads here keep their size, so that this is a mask per head.

    >>> q, k, v = problem(6)
    >>> o = attention(q, k, v, "ls", causal=True, n_long=1, local_window=2)
    >>> full, near = (attention(q, k, v, m, causal=True) for m in ("softmax", LS(0, 2)))
    >>> bool(torch.equal(o[:, 3:], full[:, 3:])), bool(torch.equal(o[:, :3], near[:, :3]))
    (True, True)
    """

    n_long: int = 1
    local_window: int = 256
    long_heads: tuple[int, ...] | None = None

    part = "core"
    kind = "needs recovery"
    honours = KEPT
    paper = "arXiv 2505.15548"
    heads_alike = False
    tries = ({"n_long": 1, "local_window": 3}, {"local_window": 2, "long_heads": (0, 2)})

    def __post_init__(self) -> None:
        if self.long_heads is not None:
            object.__setattr__(self, "long_heads", tuple(sorted(set(self.long_heads))))
        if self.n_long < 0 or self.local_window < 1:
            found = f"n_long={self.n_long}, local_window={self.local_window}"
            raise Refused(found, where="ls", fits="n_long at least 0, local_window at least 1")

    def fits(self, site: Site) -> str | None:
        if not site.self_attention:
            return "ls compares positions of queries and keys, this site is cross-attention"
        named = self.long_heads or ()
        if self.n_long > site.heads or any(not 0 <= h < site.heads for h in named):
            return f"ls: {f'long heads {named}' if named else f'{self.n_long} long heads'} of {site.heads}"
        return None

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads, reach, causal = site.heads, self.local_window, site.causal

        def near(i: Any, j: Any) -> Any:
            return i - j < reach if causal else (i - j < reach) & (j - i < reach)

        if self.long_heads is None:
            first = heads - self.n_long
            keep = (lambda h, i, j: near(i, j) | (h >= first)) if self.n_long else lambda h, i, j: near(i, j)
        else:
            long = table(torch.tensor([h in self.long_heads for h in range(heads)], device=q.device))
            keep = lambda h, i, j: near(i, j) | (long[h] != 0)
        return attend(q, k, v, keep=keep, site=site)

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(9)
        full = lambda: attention(q, k, v, "softmax", causal=True)
        yield Limit("a window of n", lambda: attention(q, k, v, LS(0, 9), causal=True), full)
        yield Limit("all heads long", lambda: attention(q, k, v, LS(4, 1), causal=True), full)
        yield Limit(
            "no long head is a window",
            lambda: attention(q, k, v, LS(0, 3), causal=True),
            lambda: attention(q, k, v, "window", window=3, sinks=0, causal=True),
        )
        yield Limit(
            "spans of equal length, without a sink",
            lambda: attention(q, k, v, LS(1, 3), causal=True),
            lambda: attention(q, k, v, "moa", alpha=(3, 3, 3, 9), beta=0.0, block_size=1, sink_blocks=0, min_span=1,
                              causal=True),
        )  # fmt: skip
