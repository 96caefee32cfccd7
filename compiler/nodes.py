"""What a node of a captured graph calls: the operator, its name, and whether it writes to memory or draws numbers."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import fx


def is_overload(target: Any) -> TypeGuard[torch._ops.OpOverload]:
    """Whether a target is a registered operator with its types settled, aten.add.Tensor: what graphs are made of."""
    return isinstance(target, torch._ops.OpOverload)


def op_name(node: Any) -> str:
    """aten.view.default -> "view"; anything else -> ""."""
    target = getattr(node, "target", None)
    return target._opname if is_overload(target) else ""


def higher_order_name(node: fx.Node) -> str:
    """The name of an operator that runs graphs (flex_attention, a branch, a region under autocast); else ""."""
    return node.target.name() if isinstance(node.target, torch._ops.HigherOrderOperator) else ""


def overload_of(packet: Any, overload: str) -> Any:
    """One overload of an operator as torch.ops hands it out, by name; None where there is none."""
    found = getattr(packet, overload, None) if isinstance(packet, torch._ops.OpOverloadPacket) else None
    return found if is_overload(found) else None


def writes(node: fx.Node) -> bool:
    """Whether it may write to its arguments."""
    return is_overload(node.target) and node.target._schema.is_mutable


def draws(node: fx.Node) -> bool:
    """Whether it takes random numbers."""
    return is_overload(node.target) and torch.Tag.nondeterministic_seeded in node.target.tags


def args_of(node: Any) -> tuple[Any, ...]:
    """The arguments of a node that is known to have them; fx declares each as any of a dozen types."""
    return node.args
