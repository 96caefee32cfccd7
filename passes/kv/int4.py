"""Keys and values of 4 bits, a scale and a zero for each token and head (KV4 of QServe, arXiv 2405.04532).

k ~ c s - z,   s = half((max k - min k) / 15),   z = half(-min k),   c = round((k + z) / s) in 0..15
"""

from __future__ import annotations

from dataclasses import dataclass

from ...compiler.mechanism import register
from .levels import Levels


@register("int4")
@dataclass(frozen=True)
class Int4(Levels):
    bits = 4
