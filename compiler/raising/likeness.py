"""`ones_like(scores)` reads no score, only its shape: such readers are given the shape from elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..nodes import op_name
from .build import Builder, aten
from .layout import tensor_of
from .near import Unraised
from .parts import views_of
from .scores import carries_scores

FILLED = {"zeros_like": 0, "ones_like": 1, "empty_like": 0}
RESHAPED = {"expand_as": aten.expand.default, "view_as": aten.reshape.default, "reshape_as": aten.reshape.default}
MADE = {"new_zeros": 0, "new_ones": 1, "new_empty": 0, "new_full": None}  # of a size that is given


def forget_likeness(graph: fx.Graph) -> None:
    """Operators that only take their shape or type from scores take it from elsewhere."""
    for node in list(graph.nodes):
        name = op_name(node)
        if name == "type_as" and node.args[0] is not node.args[1]:
            node.target, node.args = aten.to.dtype, (node.args[0], tensor_of(node.args[1]).dtype)
        elif name in RESHAPED and _scores(node.args[1]):
            _replace(node, lambda b, n, sizes: b.call(RESHAPED[op_name(n)], n.args[0], sizes), node.args[1])
        elif name in MADE and _scores(node.args[0]):
            _made(node)
        elif name in (*FILLED, "full_like") and _scores(node.args[0]):
            _replace(node, _filled, node.args[0])


def _scores(node: Any) -> bool:
    """Scores, or a part of them."""
    value = tensor_of(node)
    return value is not None and value.ndim > 1 and carries_scores(views_of(node)[-1])


def _filled(builder: Builder, node: fx.Node, sizes: list[Any]) -> fx.Node:
    value = tensor_of(node)
    fill = FILLED.get(op_name(node), node.args[-1])
    return builder.call(aten.full.default, sizes, fill, dtype=value.dtype, device=value.device)


def _made(node: fx.Node) -> None:
    value, fill = tensor_of(node), MADE[op_name(node)]
    with node.graph.inserting_before(node):
        options = {"dtype": value.dtype, "device": value.device}
        new = node.graph.call_function(
            aten.full.default, (node.args[1], node.args[2] if fill is None else fill), options
        )
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _replace(node: fx.Node, make: Any, like: Any) -> None:
    builder = Builder(node, [n for n in node.graph.find_nodes(op="placeholder") if tensor_of(n) is not None])
    sizes = _sizes(builder, node, tensor_of(like))
    if sizes is None:
        return
    new = make(builder, node, sizes)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _sizes(builder: Builder, node: fx.Node, like: torch.Tensor) -> list[int | fx.Node] | None:
    found: list[int | fx.Node] = []
    for size in like.shape:
        known = size if isinstance(size, int) else _counted(node, size)
        try:
            found.append(builder.shaped_size(size) if known is None else known)
        except Unraised:
            return None
    return found


def _counted(node: fx.Node, size: torch.SymInt) -> fx.Node | None:
    """A number of the graph, in front of the node, that is this size and is not asked of the scores themselves."""
    for other in node.graph.nodes:
        if other is node:
            return None
        value = other.meta.get("val")
        asked = op_name(other) == "sym_size" and other.args[0].op != "placeholder"
        if isinstance(value, torch.SymInt) and value.node.expr == size.node.expr and not asked:
            return other
    return None
