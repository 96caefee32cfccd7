"""Softmax weights times a learned Toeplitz matrix C[j - i], which may tell positions apart (URPE, arXiv 2205.13401)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...compiler.functional import attention
from ...compiler.live import KEPT
from ...compiler.mechanism import Limit, Mechanism, Param, register
from ...compiler.primitives.attend import attend
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.site import Site
from ...compiler.starts import constant, normal
from ...compiler.symbols import table

BUCKETS = ("unique", "log")


@register("urpe")
@dataclass(frozen=True)
class Urpe(Mechanism):
    """o_i = sum_j softmax_j(scale * q_i . k_j + b[j - i]) C[j - i] v_j; rows need not sum to 1, C may be negative.

    C is urpe_weight (rows, H), which starts at 1, b is rpe_bias (rows, H), which starts at 0 (without use_bias: none):
    together softmax attention. unique: a row per distance, j - i + max_len - 1. log: num_buckets + 1 rows, one per
    distance up to a quarter of num_buckets, then logarithmically wider up to max_distance, beyond which all share one.
    Distances of max_len or more share the outermost row.

    >>> q, k, v = problem(5)
    >>> u = v[:, :, :1].expand_as(v)
    >>> C = torch.rand(9, 4)
    >>> o = attention(q, k, u, "urpe", max_len=5, params={"urpe_weight": C})
    >>> bool((o[:, :, 0] - o[:, :, 1]).abs().max() > 0.1)  # softmax would give u at every position
    True

    constant_init=False draws C with deviation 0.02, the reference's other start, which is far from softmax. The
    reference shares one pair of tables between all layers; here each site has its own.
    """

    max_len: int = 512
    buckets: str = "unique"
    num_buckets: int = 64
    max_distance: int = 128
    use_bias: bool = True
    constant_init: bool = True

    part = "core"
    kind = "needs recovery"
    honours = KEPT
    least = {"num_buckets": 1, "max_distance": 1}
    paper = "arXiv 2205.13401"
    tries = (
        {"max_len": 4, "use_bias": False},
        {"max_len": 40, "buckets": "log", "num_buckets": 8, "max_distance": 16},
    )

    def __post_init__(self) -> None:
        if self.buckets not in BUCKETS or self.max_len < 1:
            found = f"buckets={self.buckets!r}, max_len={self.max_len}"
            raise Refused(found, where="urpe", fits=f"buckets one of {', '.join(BUCKETS)}, max_len >= 1")
        if self.buckets == "log" and (self.num_buckets < 4 or self.max_distance <= self.num_buckets // 4):
            found = f"num_buckets={self.num_buckets}, max_distance={self.max_distance}"
            raise Refused(found, where="urpe", fits="num_buckets >= 4 and max_distance > num_buckets // 4")

    def fits(self, site: Site) -> str | None:
        if not site.self_attention:
            return "urpe compares positions of queries and keys, this site is cross-attention"
        return None

    @property
    def rows(self) -> int:
        return 2 * self.max_len - 1 if self.buckets == "unique" else self.num_buckets + 1

    def params(self, site: Site) -> Mapping[str, Param]:
        shape = (self.rows, site.heads)
        own = {"urpe_weight": Param(shape, constant(1.0) if self.constant_init else normal(0.02))}
        return own | ({"rpe_bias": Param(shape)} if self.use_bias else {})

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        C = table(self._by_distance(p.urpe_weight))
        b = table(self._by_distance(p.rpe_bias)) if self.use_bias else None
        zero = self.max_len - 1  # the row of distance 0; lookups are clamped to the rows there are
        score = None if b is None else (lambda s, h, i, j: s + b[j - i + zero, h])
        return attend(q, k, v, score=score, after=lambda w, h, i, j: w * C[j - i + zero, h], site=site)

    def _by_distance(self, rows: Tensor) -> Tensor:
        """(2 max_len - 1, H): the table's row of every distance."""
        if self.buckets == "unique":
            return rows
        return rows.index_select(0, self._log_rows(rows.device))

    def _log_rows(self, device: torch.device) -> Tensor:
        half = self.num_buckets // 2
        exact = half // 2
        d = torch.arange(1 - self.max_len, self.max_len, device=device)
        n = d.abs().clamp(min=1)
        wide = exact + ((n / exact).log() / math.log(self.max_distance / exact) * (half - exact)).long()
        signed = torch.where(n < exact, n, wide.clamp(max=half - 1)) * d.sign()
        signed = torch.where(d >= 0, signed + 2, signed)  # the reference leaves two rows unused between the signs
        return signed - signed[:1]  # the first is the least

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(7)
        C, own = torch.rand(13, 4, generator=torch.Generator().manual_seed(1)), torch.zeros(13, 4)
        own[6] = 1.0

        def urpe(t: Tensor, causal: bool) -> Tensor:
            return attention(q, k, v, Urpe(max_len=7), causal=causal, params={"urpe_weight": t})

        weights = torch.softmax(q @ k.mT * 8**-0.5, -1).diagonal(dim1=2, dim2=3)
        yield Limit(
            "C = 1 is softmax", lambda: urpe(0 * C + 1, True), lambda: attention(q, k, v, "softmax", causal=True)
        )
        yield Limit("a constant C scales", lambda: urpe(0 * C - 2.5, False), lambda: -2.5 * urpe(0 * C + 1, False))
        yield Limit("it is linear in C", lambda: urpe(C + own, True), lambda: urpe(C, True) + urpe(own, True))
        yield Limit("C at distance 0 alone", lambda: urpe(own, False), lambda: weights[..., None] * v)
