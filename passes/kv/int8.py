"""Keys and values of 8 bits, a scale and a zero for each token and head (KV8 of QServe, arXiv 2405.04532).

k ~ c s - z,   s = half((max k - min k) / 255),   z = half(-min k),   c = round((k + z) / s) in 0..255
"""

from __future__ import annotations

from dataclasses import dataclass

from ...compiler.mechanism import register
from .levels import Levels


@register("int8")
@dataclass(frozen=True)
class Int8(Levels):
    bits = 8
