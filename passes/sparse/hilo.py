"""High and low frequencies in heads of their own: windows for some, pooled keys for the others (arXiv 2205.13213)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...compiler.functional import attention
from ...compiler.mechanism import Limit, Mechanism, register
from ...compiler.primitives.attend import attend
from ...compiler.primitives.reduce_kv import reduce_kv
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.site import Site
from ...compiler.symbols import table
from .grid_windows import Cut, attend_windows, no_grid


@register("hilo")
@dataclass(frozen=True)
class HiLo(Mechanism):
    """The first heads attend inside windows of window x window tokens, the last floor(alpha H) to the windows' means.

    Hi-Fi: o = softmax(scale q kᵀ) v over the window's keys; Lo-Fi: the same over the means of k and v of every window
    (pooling the hidden state first is the same, projections being affine). window 1 is plain attention in all heads.
    Windows that the grid does not fill hold, and are means of, the real tokens alone. Prefix tokens are keys of all.

    >>> q, k, v = problem(16)
    >>> o = attention(q, k, v, "hilo", grid=(4, 4), window=2, alpha=0.5)
    >>> block = attention(q[:, :2, [0, 1, 4, 5]], k[:, :2, [0, 1, 4, 5]], v[:, :2, [0, 1, 4, 5]], "softmax")
    >>> bool((o[:, :2, [0, 1, 4, 5]] - block).abs().max() < 1e-6)
    True
    """

    window: int = 2
    alpha: float = 0.5
    scale: float | None = None

    part = "core"
    kind = "needs recovery"
    honours = {"padding"}
    paper = "arXiv 2205.13213"
    heads_alike = False
    tries = ({}, {"window": 3, "alpha": 0.9}, {"alpha": 0.0}, {"alpha": 1.0}, {"window": 1})

    def __post_init__(self) -> None:
        if self.window < 1 or not 0 <= self.alpha <= 1:
            raise Refused(
                f"window={self.window}, alpha={self.alpha}", where="hilo", fits="window >= 1, 0 <= alpha <= 1"
            )

    def fits(self, site: Site) -> str | None:
        return no_grid(site, "hilo")

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None = None) -> Tensor:
        scale = site.scale if self.scale is None else self.scale
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        high = 0 if self.window == 1 else q.shape[1] - int(q.shape[1] * self.alpha)
        cut, found = Cut(site.grid, self.window, self.window), []
        if high:
            q_high, k_high, v_high = (t[:, :high] for t in (q, k, v))
            found.append(attend_windows(q_high, k_high, v_high, cut, scale=scale, key_padding=key_padding))
        if high < q.shape[1]:
            found.append(self._low(q[:, high:], k[:, high:], v[:, high:], cut, scale, key_padding))
        return torch.cat(found, 1)

    def _low(self, q: Tensor, k: Tensor, v: Tensor, cut: Cut, scale: float, key_padding: Tensor | None) -> Tensor:
        """Every query over one key for each window, and over the prefix keys as they are."""
        prefix, rows = cut.grid.prefix, cut.rows(q.device)
        rows = torch.where(rows < 0, -1, rows + prefix)
        alone = torch.arange(prefix, device=q.device)[:, None].expand(prefix, rows.shape[1])
        alone = torch.where(torch.arange(rows.shape[1], device=q.device) == 0, alone, -1)
        k, v, mass = reduce_kv(k, v, torch.cat((alone, rows)), valid=key_padding)
        held = table(mass)
        seen = None if key_padding is None else (lambda b, h, j: held[b, h, j] > 0)
        return attend(q, k, v, scale=scale, keep=seen)

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(12)
        softmax = lambda: attention(q, k, v, "softmax")
        yield Limit(
            "windows of one token are full attention", lambda: attention(q, k, v, HiLo(1), grid=(3, 4)), softmax
        )
        yield Limit("a window over the picture is full attention",
                    lambda: attention(q, k, v, HiLo(4, 0.0), grid=(3, 4)), softmax)  # fmt: skip
        k4, v4 = (t[:, :, ::4].repeat_interleave(4, 2) for t in (k, v))
        yield Limit("low heads over keys that are equal inside windows are full attention",
                    lambda: attention(q, k4, v4, HiLo(4, 1.0), grid=(12, 1)),
                    lambda: attention(q, k4, v4, "softmax"))  # fmt: skip
