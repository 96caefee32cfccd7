"""Mixture of attention spans: every head has a window of its own, that grows with the sequence (arXiv 2406.14909)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
from ...compiler.symbols import build, table


@register("moa")
@dataclass(frozen=True)
class MoA(Mechanism):
    """Head h sees span = alpha_h + beta_h L tokens: the sink_blocks first blocks and its latest ones, j <= i.

    L = n + max_new_tokens, n the number of keys, or `length` where the prompt's is to count while tokens are added.
    span is at most L and at least min_span, in whole blocks; the sink is inside of it: with c = j // block_size,
    b = i // block_size a key is seen where c < sink or c > b - local, sink + local = span / block_size.
    alpha and beta are one number, one per key head or one per head; `moa_search` finds them, per layer.

    >>> q, k, v = problem(8)
    >>> o = attention(q, k, v, "moa", causal=True, alpha=4, beta=0.0, block_size=2, min_span=1, max_new_tokens=0)
    >>> seen = attention(q[:, :, 7:], k[:, :, [0, 1, 6, 7]], v[:, :, [0, 1, 6, 7]], "softmax")  # a sink, a local block
    >>> bool((o[:, :, 7:] - seen).abs().max() < 1e-6)
    True
    """

    alpha: float | tuple[float, ...] = 0.0
    beta: float | tuple[float, ...] = 0.5
    block_size: int = 64
    sink_blocks: int = 1
    min_span: int = 128
    max_new_tokens: int = 1024
    length: int | None = None

    part = "core"
    kind = "approximate"
    honours = KEPT
    least = {"length": 1}
    paper = "arXiv 2406.14909"
    heads_alike = False
    tries = (
        {},
        {"alpha": 3, "beta": 0.25, "block_size": 2, "min_span": 1, "max_new_tokens": 0},
        {"alpha": (1, 2, 3, 4, 5, 6), "beta": 0.0, "block_size": 1, "min_span": 1},
    )

    def __post_init__(self) -> None:
        for rule in ("alpha", "beta"):
            if isinstance(getattr(self, rule), list | tuple):
                object.__setattr__(self, rule, tuple(getattr(self, rule)))
        if min(self.block_size, self.min_span) < 1 or min(self.sink_blocks, self.max_new_tokens) < 0:
            found = f"block_size={self.block_size}, min_span={self.min_span}, sink_blocks={self.sink_blocks}"
            raise Refused(found, where="moa", fits="block_size and min_span at least 1, the others at least 0")

    def fits(self, site: Site) -> str | None:
        if site.pattern != "causal-self":
            return f"moa looks back from each token, this site is {site.pattern}"
        for rule in ("alpha", "beta"):
            given = getattr(self, rule)
            if isinstance(given, tuple) and len(given) not in (site.heads, site.kv_heads):
                return f"moa: {len(given)} numbers {rule} for {site.heads} heads and {site.kv_heads} key heads"
        return None

    def rules(self, heads: int) -> list[tuple[float, float]]:
        """(alpha, beta) of every head."""
        both = [given if isinstance(given, tuple) else (given,) for given in (self.alpha, self.beta)]
        return list(zip(*([given[h * len(given) // heads] for h in range(heads)] for given in both), strict=True))

    def spans(self, heads: int, keys: int) -> list[int]:
        """The span of every head in tokens, a multiple of block_size.

        >>> MoA(alpha=(0, 512), beta=(0.5, 0.0), max_new_tokens=0).spans(2, 4096)
        [2048, 512]
        """
        total = (keys if self.length is None else self.length) + self.max_new_tokens
        found = [max(min(int(alpha + beta * total), total), self.min_span) for alpha, beta in self.rules(heads)]
        return [-(-span // self.block_size) * self.block_size for span in found]

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.length is None and any(beta for _, beta in self.rules(site.heads)):
            return attend(q, k, v, keep=self._elastic(site.heads, q.device), site=site)
        size, known = self.block_size, [span // self.block_size for span in self.spans(site.heads, 1 << 40)]
        if len(set(known)) == 1:  # one predicate for all, whose tiles are known beforehand
            sink = min(known[0], self.sink_blocks)
            local = known[0] - sink
            return attend(q, k, v, keep=lambda i, j: (j // size < sink) | (j // size > i // size - local), site=site)
        blocks = torch.tensor(known, device=q.device)
        sinks = blocks.clamp(max=self.sink_blocks)
        first, last = table(sinks), table(blocks - sinks)
        return attend(
            q, k, v, keep=lambda h, i, j: (j // size < first[h]) | (j // size > i // size - last[h]), site=site
        )

    def _elastic(self, heads: int, device: torch.device) -> Callable[..., Any]:
        """The same rule where spans grow with M, the number of keys; what depends on it is not decoded."""
        alpha, beta = map(table, torch.tensor(self.rules(heads), dtype=torch.float64, device=device).unbind(1))
        size = self.block_size

        def keep(h: Any, i: Any, j: Any, M: Any) -> Any:
            total = M + self.max_new_tokens
            span = build("minimum", build("floor", alpha[h] + beta[h] * total), total)
            blocks = (build("maximum", span, self.min_span) + (size - 1)) // size
            sink = build("minimum", blocks, self.sink_blocks)
            return (j // size < sink) | (j // size > i // size - (blocks - sink))

        return keep

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(11)
        causal = lambda: attention(q, k, v, "softmax", causal=True)
        yield Limit("a span of n is full attention", lambda: attention(q, k, v, MoA(0, 1.0, 2), causal=True), causal)
        yield Limit("the least span is full attention", lambda: attention(q, k, v, MoA(-99, 0.0), causal=True), causal)
        yield Limit(
            "equal rules in blocks of one are a window with sinks",
            lambda: attention(q, k, v, MoA(5, 0.0, 1, 2, 1, 0), causal=True),
            lambda: attention(q, k, v, "window", window=3, sinks=2, causal=True),
        )
