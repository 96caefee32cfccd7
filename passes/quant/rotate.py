"""Outliers are spread over all channels: the stream that blocks read is turned by a Hadamard matrix (arXiv 2405.04532).

    x <- R x, R R^T = 1:   embeddings and all that writes to the stream times R, all that reads it times R^T

Norms' scales are absorbed by what reads their outputs; LayerNorm takes a mean away, which only a rotation that leaves
the vector of ones alone commutes with (kind: random), so that no operation of the model changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...compiler.algebra.hadamard import rotation
from ...compiler.algebra.moves import Absorb, Move
from ...compiler.algebra.rewrites import Rotate as Turned
from ...compiler.algebra.stage import WeightPass, Weights
from ...compiler.mechanism import register


@register("rotate")
@dataclass(frozen=True)
class Rotate(WeightPass):
    type: Literal["hadamard", "random"] = "hadamard"
    stream: bool = True
    values: bool = False  # a rotation within each head's values, which W_o takes back
    seed: int = 0  # of random ones

    paper = "arXiv 2405.04532"

    def move(self, weights: Weights) -> None:
        streams = weights.of_kind("residual", "rotate") if self.stream else ()
        for group in streams:
            weights.apply(Absorb.of(group, weights.state))
            R = rotation(group.size, self.type, seed=self.seed, keeps_mean=group.keeps_mean)
            weights.apply(Move(group, Turned(R)))
        heads = weights.of_kind("values", "rotate") if self.values else ()
        for group in heads:
            weights.apply(Move(group, Turned(rotation(group.size, self.type, seed=self.seed))))
        weights.say(f"{len(streams)} streams and the values of {len(heads)} sites turned")
