"""Channels of like size stand side by side, so that a group of weights shares a scale (QServe, arXiv 2405.04532).

    order = argsort(max over tokens |x_c|), ascending: columns of what reads x, rows of what writes it

In front of W_o the order stays within each head, and is one for the query heads of a key head, since W_v's rows move.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...compiler.algebra.moves import Move
from ...compiler.algebra.rewrites import Permute
from ...compiler.algebra.stage import WeightPass, Weights
from ...compiler.calibration import AbsMax
from ...compiler.mechanism import register
from .inputs import inputs_of


@register("reorder")
@dataclass(frozen=True)
class Reorder(WeightPass):
    values: bool = True  # also in front of W_o

    paper = "arXiv 2405.04532"

    def move(self, weights: Weights) -> None:
        kinds = ("ffn", "values") if self.values else ("ffn",)
        groups = [g for kind in kinds for g in weights.of_kind(kind, "permute")]
        seen = weights.calibrate({str(k): (inputs_of(weights.program, g), AbsMax(-1)) for k, g in enumerate(groups)})
        for k, group in enumerate(groups):
            most = seen[str(k)].reshape(group.blocks, -1, group.size).amax(1)
            weights.apply(Move(group, Permute.of(*most.argsort(dim=-1, stable=True).tolist())))
        weights.say(f"channels ordered in {len(groups)} places")
