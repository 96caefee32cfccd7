"""Weights of 8 bits, a scale an output; activations of 8 bits, a scale a token (ZeroQuant, arXiv 2206.01861).

y_t = s_t (round(x_t / s_t) . c) s,   s_t = max |x_t| / 127,   W ~ c s
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...compiler.mechanism import register
from ...compiler.primitives.qlinear_spec import QLinearSpec
from ...compiler.quantize import Scheme
from .rounding import by_output


@register("w8a8")
@dataclass(frozen=True)
class W8A8(Scheme):
    paper = "arXiv 2206.01861"

    def spec(self, inputs: int, *, bias: bool) -> QLinearSpec:
        return QLinearSpec("int8", inputs, activations="int8", bias=bias)

    def tensors(self, weight: Tensor, gram: Tensor | None = None) -> Sequence[Tensor]:
        return by_output(weight)
