"""Weights of 4 bits, a scale and a zero for each group of inputs, rounded to nearest (AWQ's format, arXiv 2306.00978).

W ~ c s - z,   s = (max - min) / 15,   z = -min   over a group,   c = round((W + z) / s) in 0..15
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ...compiler.mechanism import register
from ...compiler.primitives.qlinear_spec import QLinearSpec, packed
from ...compiler.quantize import Scheme, divisible
from .rounding import by_group


@register("w4a16")
@dataclass(frozen=True)
class W4A16(Scheme):
    group_size: int = 128  # inputs that share a scale; -1: all of an output's

    rounding: Literal["nearest", "gptq"] = "nearest"  # gptq: errors made up for, by the inputs of the calibration data

    paper = "arXiv 2306.00978"

    @property
    def fitted(self) -> bool:
        return self.rounding == "gptq"

    def spec(self, inputs: int, *, bias: bool) -> QLinearSpec:
        return QLinearSpec("int4", inputs, group=divisible(inputs, self.group_size, "w4a16"), bias=bias)

    def tensors(self, weight: Tensor, gram: Tensor | None = None) -> Sequence[Tensor]:
        codes, scale, zero = by_group(weight, self.spec(weight.shape[1], bias=False).group, gram)
        return packed(codes), scale, zero
