"""Constant factors on queries and keys, which belong to the scale of the score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from ..ports import RESHAPING, op_name
from .reading import plain_name


def unscaled(q: fx.Node, k: fx.Node) -> tuple[fx.Node, fx.Node, float, Callable[[], None]]:
    """q and k without constant factors that nothing else reads, the factor, and what makes it so afterwards."""
    factor = 1.0
    sides = []
    scaled: list[tuple[fx.Node, fx.Node]] = []
    for side in (q, k):
        node: Any = side
        while isinstance(node, fx.Node) and len(node.users) <= 1 and (plain_name(node) in RESHAPING):
            node = node.args[0]
        scalar = _scalar(node)
        if scalar is not None and len(node.users) <= 1:
            source = node.args[0]
            if node is side:
                side = source
            else:
                scaled.append((node, source))
            factor *= scalar
        sides.append(side)

    def settle() -> None:
        for node, source in scaled:
            node.replace_all_uses_with(source)

    return sides[0], sides[1], factor, settle


def _scalar(node: Any) -> float | None:
    if not isinstance(node, fx.Node) or len(node.args) < 2 or not isinstance(node.args[1], int | float):
        return None
    if op_name(node) == "mul":
        return float(node.args[1])
    return 1.0 / float(node.args[1]) if op_name(node) in ("div", "true_divide") else None
