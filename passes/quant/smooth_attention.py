"""Large key channels shrink and queries grow by as much, so that keys fit into 4 bits (QServe, arXiv 2405.04532).

m_c = max over tokens |k_c|  (after RoPE; one m for both channels that it turns together, as it must commute)
lambda = m^alpha / n^beta,  n the same of the queries;    W_k <- W_k / lambda,  W_q <- lambda W_q
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...compiler.algebra.groups import Group
from ...compiler.algebra.moves import Move
from ...compiler.algebra.rewrites import Scale
from ...compiler.algebra.stage import WeightPass, Weights
from ...compiler.calibration import AbsMax
from ...compiler.mechanism import register
from ...compiler.refusal import Refused


@register("smooth_attention")
@dataclass(frozen=True)
class SmoothAttention(WeightPass):
    alpha: float = 0.5
    beta: float = 0.0

    paper = "arXiv 2405.04532"

    def __post_init__(self) -> None:
        if not (0 <= self.alpha <= 1 and 0 <= self.beta <= 1):
            raise Refused(f"alpha={self.alpha}, beta={self.beta}", where="smooth_attention", fits="0 to 1 each")

    def move(self, weights: Weights) -> None:
        groups = {g.where: g for g in weights.of_kind("keys", "scale")}
        wanted: dict[str, Any] = {}
        for site in weights.program.sites:
            if (where := site.path.partition("#")[0]) in groups:
                nodes = weights.program.ports[site.path].nodes
                wanted |= {f"{where} k": (nodes["k"], AbsMax(1, -1)), f"{where} q": (nodes["q"], AbsMax(1, -1))}
        seen = weights.calibrate(wanted)
        for where, group in groups.items():
            weights.apply(Move(group, Scale(1 / self.factors(group, seen[f"{where} k"], seen[f"{where} q"]))))
        weights.say(f"keys smoothed at {len(groups)} of {len(weights.program.sites)} sites")

    def factors(self, group: Group, k: Tensor, q: Tensor) -> Tensor:
        """lambda (Hkv, D) of the largest magnitudes of keys (Hkv, D) and queries (H, D); channels without any stay."""
        m, n = (_paired(group, t.double()) for t in (k, q.unflatten(0, (group.blocks, -1)).amax(1)))
        still = (m == 0) | (n == 0)
        factors = torch.where(still, 1.0, m).pow(self.alpha) / torch.where(still, 1.0, n).pow(self.beta)
        return torch.where(still, 1.0, factors)


def _paired(group: Group, most: Tensor) -> Tensor:
    return torch.maximum(most, most[:, list(group.partners)]) if group.partners else most
