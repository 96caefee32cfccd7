"""In-place operators on the way to a softmax become values: `x += bias` is a new x for all who read x later."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import fx

from ..nodes import args_of, op_name
from ..regions import mapped
from .build import Builder
from .layout import CASTS, KEEPING, TURNS, VIEWS, argument, erase_idle, tensor_of
from .parts import same_part, step_on_part, views_of
from .scores import carries_scores

# what may share the memory of its input; "" is one of several results, which split and unbind share
_ALIASING = VIEWS | TURNS | CASTS | (KEEPING - {"clone"}) | {"slice", "select", "expand", "expand_as", ""}


def make_values(graph: fx.Graph) -> None:
    """Every in-place operator whose target is a value of the graph, read in one order only, is replaced."""
    inside = {node for nodes in mapped(graph) for node in nodes}  # values of one example: no operator runs on them here
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
        if _onto_itself(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node in inside:
            continue
        if op_name(node).endswith("_") and not op_name(node).startswith("_") and tensor_of(node) is not None:
            _make_value(node)
    erase_idle(graph)  # views that were only there to be written to


def _onto_itself(node: fx.Node) -> bool:
    """What Python makes of `s[:, :2] += 1`: the part that was changed in place, copied onto itself."""
    target, source = node.args[:2]
    if not (op_name(source).endswith("_") and not node.users):
        return False
    return same_part(args_of(source)[0], target)


def _make_value(node: fx.Node) -> None:
    chain = views_of(node.args[0])
    base = chain[-1]
    if base.op != "call_function" or op_name(base) in _ALIASING or _seen_otherwise(base, chain, node):
        return
    builder = Builder(node, [base])
    value = step_on_part(node, chain, builder) if len(chain) > 1 and carries_scores(base) else None
    views = [] if value is not None else chain
    if value is None and all(op_name(view) == "slice" for view in chain[:-1]):
        value = _value(node, builder)
    if value is None:
        return
    for inner, outer in pairwise(views):
        where = [argument(inner, k, name) for k, name in enumerate(("dim", "start", "end", "step"), 1)]
        where = [0 if where[0] is None else where[0], *where[1:3], 1 if where[3] is None else where[3]]
        value = builder.call(torch.ops.aten.slice_scatter.default, outer, value, *where)
    _replace_later(base, value, node)
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)
    for view in chain[:-1]:
        if not view.users:
            node.graph.erase_node(view)


def _seen_otherwise(base: fx.Node, chain: list[Any], node: fx.Node) -> bool:
    """A view taken before the write and read after it would change with it; so would what the base is a view of."""
    for user in base.users:
        if user in chain or user is node:
            continue
        if op_name(user) in _ALIASING and user < node and _read_after(user, node):
            return True
    if len(chain) > 1 and node.users:
        return True
    return any(reader > node for view in chain[:-1] for reader in view.users if reader is not node)


def _read_after(view: fx.Node, node: fx.Node) -> bool:
    """Whether a view, or a view of it, is read behind the write."""
    return any(reader > node or (op_name(reader) in _ALIASING and _read_after(reader, node)) for reader in view.users)


def _value(node: fx.Node, builder: Builder) -> fx.Node | None:
    name, overload = op_name(node).removesuffix("_"), node.target._overloadname  # type: ignore[union-attr]
    target, rest = node.args[0], node.args[1:]
    if name == "index_put" and _is_filled(node):
        return builder.call(torch.ops.aten.masked_fill.Tensor, target, rest[0][-1], rest[1])  # type: ignore[index]
    if name == "copy":
        source = rest[0]
        if tensor_of(source).dtype != tensor_of(target).dtype:
            source = builder.call(torch.ops.aten.to.dtype, source, tensor_of(target).dtype)
        if tensor_of(source).shape != tensor_of(target).shape:
            source = builder.call(torch.ops.aten.expand_as.default, source, target)
        return source  # type: ignore[return-value]
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or overload not in packet.overloads():
        return None
    return builder.call(getattr(packet, overload), target, *rest, **node.kwargs)


def _is_filled(node: fx.Node) -> bool:
    """One number put where a mask of the same shape says, or of all dimensions behind those taken whole: s[:, :, m]."""
    target, where, number, *accumulated = node.args
    value = tensor_of(number)
    *whole, last = where  # type: ignore[misc, str-unpack]
    if any(w is not None for w in whole) or any(accumulated) or value is None or value.ndim:
        return False
    mask = tensor_of(last)
    return mask is not None and mask.dtype == torch.bool and len(whole) + mask.ndim == tensor_of(target).ndim


def _replace_later(base: fx.Node, value: fx.Node, node: fx.Node) -> None:
    for user in list(base.users):
        if user > node:
            user.replace_input_with(base, value)
