"""Key heads in another order, their query heads with them: like ones stand together (DuoAttention, arXiv 2410.10819).

Rows of W_q, W_k, W_v with their biases and columns of W_o move together; the model computes the same. Full heads in
front and streaming heads behind are then two slices of q, k and v instead of two gathers.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...compiler.algebra.groups import group
from ...compiler.algebra.moves import Move
from ...compiler.algebra.rewrites import Permute
from ...compiler.algebra.stage import WeightPass, Weights
from ...compiler.mechanism import register
from ...compiler.refusal import Refused


@register("head_order")
@dataclass(frozen=True)
class HeadOrder(WeightPass):
    orders: tuple[tuple[str, tuple[int, ...]], ...] = ()  # (site, its key heads in their new order), ...

    paper = "arXiv 2410.10819"

    def __post_init__(self) -> None:
        """A recipe gives lists."""
        frozen = tuple((path, tuple(order)) for path, order in self.orders)
        object.__setattr__(self, "orders", frozen)

    def move(self, weights: Weights) -> None:
        if not self.orders:
            raise Refused("no orders", fits="orders: [[model.layers.0.self_attn, [1, 0]]]")
        for path, order in self.orders:
            weights.apply(Move(group(weights.groups, "heads", path), Permute.of(order)))
        weights.say(f"heads in another order at {len(self.orders)} sites")
