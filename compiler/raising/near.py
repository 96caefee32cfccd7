"""What looks like attention and is not raised: the place, the node, the reason."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True)
class NearMiss:
    """One softmax or fused attention that stays as it is."""

    where: str  # module path
    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where or 'model'}: {self.reason} (%{self.node})"


class Unraised(Exception):
    """Raised inside this package where a place turns out not to be attention."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


def module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""
