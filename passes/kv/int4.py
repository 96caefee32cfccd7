"""Keys and values of 4 bits, a scale and a zero for each token and head (KV4 of QServe, arXiv 2405.04532).

k ~ c s - z,   s = half((max k - min k) / 15),   z = half(-min k),   c = round((k + z) / s) in 0..15
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...compiler.kv_rows import KVRows
from ...compiler.mechanism import Limit, register
from .levels import groups_of, kept_levels


@register("int4")
@dataclass(frozen=True)
class Int4(KVRows):
    kv_group_size: int = 128  # channels of a head that share a scale; all of them where there are fewer

    paper = "arXiv 2405.04532"
    bits = 4

    def group(self, dim: int) -> int:
        return groups_of(self.kv_group_size, dim, self.slug)

    def limits(self) -> Iterable[Limit]:
        yield kept_levels(self)
