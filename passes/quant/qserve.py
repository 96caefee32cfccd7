"""Weights of 4 bits inside 8, activations of 8: groups of whole numbers under one scale (QServe, arXiv 2405.04532).

    s0_o = half(max |W_o| / 120),   U = clip(W / s0, -120, 120)
    s1 = round((max U - min U) / 15),   z = round(-min U)   over a group, whole numbers of 8 bits
    c = round((U + z) / s1) in 0..15,   w8 = c s1 - z,   y_t = s_t (round(x_t / s_t) . w8) s0

w8 is a whole number of 8 bits for whatever W, so that a product multiplies 8 bits with 8 bits and scales once. With
one group an output (group_size -1) there is no second level: W ~ c s - z, as in `w4a16`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ...compiler.mechanism import register
from ...compiler.primitives.qlinear_spec import QLinearSpec, packed
from ...compiler.quantize import Scheme, divisible
from .rounding import by_group, progressive


@register("qserve")
@dataclass(frozen=True)
class QServe(Scheme):
    group_size: int = 128  # inputs that share the second scale; -1: all of an output's

    rounding: Literal["nearest", "gptq"] = "nearest"  # gptq: errors made up for, by the inputs of the calibration data

    paper = "arXiv 2405.04532"

    @property
    def fitted(self) -> bool:
        return self.rounding == "gptq"

    def spec(self, inputs: int, *, bias: bool) -> QLinearSpec:
        group = divisible(inputs, self.group_size, "qserve")
        format = "int4" if self.group_size == -1 else "qoq"
        return QLinearSpec(format, inputs, group=group, activations="int8", bias=bias)

    def tensors(self, weight: Tensor, gram: Tensor | None = None) -> Sequence[Tensor]:
        spec = self.spec(weight.shape[1], bias=False)
        codes, *scales = (by_group if spec.format == "int4" else progressive)(weight, spec.group, gram)
        return (packed(codes), *scales)
