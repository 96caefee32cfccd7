"""Large channels in front of a block's last linear shrink, and its weights grow by as much (QServe, arXiv 2405.04532).

    lambda_c = (max over tokens |x_c|)^alpha / (max over rows |W_c|)^beta;    x <- x / lambda,  W <- W lambda

x is scaled where it is written: by W_up beside a gate, by W_v. A channel in front of a nonlinearity cannot be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...compiler.algebra.moves import Move
from ...compiler.algebra.rewrites import Scale
from ...compiler.algebra.stage import WeightPass, Weights
from ...compiler.calibration import AbsMax
from ...compiler.mechanism import register
from ...compiler.refusal import Refused
from .inputs import inputs_of, largest_weights


@register("smooth_proj")
@dataclass(frozen=True)
class SmoothProj(WeightPass):
    alpha: float = 0.3
    beta: float = 0.7
    values: bool = False  # also in front of W_o, whose inputs the values are; QoQ leaves them

    paper = "arXiv 2405.04532"

    def __post_init__(self) -> None:
        if not (0 <= self.alpha <= 1 and 0 <= self.beta <= 1):
            raise Refused(f"alpha={self.alpha}, beta={self.beta}", where="smooth_proj", fits="0 to 1 each")

    def move(self, weights: Weights) -> None:
        kinds = ("ffn", "values") if self.values else ("ffn",)
        groups = [g for kind in kinds for g in weights.of_kind(kind, "scale")]
        wanted: dict[str, Any] = {}
        for k, group in enumerate(groups):
            wanted[str(k)] = (inputs_of(weights.program, group), AbsMax(-1))
        seen = weights.calibrate(wanted)
        for k, group in enumerate(groups):
            most = seen[str(k)].double().reshape(group.blocks, -1, group.size).amax(1)
            weights.apply(Move(group, Scale(1 / self.factors(most, largest_weights(group, weights.state)))))
        weights.say(f"{len(groups)} projections smoothed")

    def factors(self, x: Tensor, w: Tensor) -> Tensor:
        """lambda of the largest magnitudes of inputs and weights; channels without any stay."""
        still = (x == 0) | (w == 0)
        factors = torch.where(still, 1.0, x).pow(self.alpha) / torch.where(still, 1.0, w).pow(self.beta)
        return torch.where(still, 1.0, factors)
