"""Weights of 8 bits, one scale an output; activations stay as they are (ZeroQuant's weights, arXiv 2206.01861).

W ~ c s,   s_o = max |W_o| / 127,   c = round(W / s)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...compiler.mechanism import register
from ...compiler.primitives.qlinear_spec import QLinearSpec
from ...compiler.quantize import Scheme
from .rounding import by_output


@register("w8")
@dataclass(frozen=True)
class W8(Scheme):
    paper = "arXiv 2206.01861"

    def spec(self, inputs: int, *, bias: bool) -> QLinearSpec:
        return QLinearSpec("int8", inputs, bias=bias)

    def tensors(self, weight: Tensor, gram: Tensor | None = None) -> Sequence[Tensor]:
        return by_output(weight)
