"""Changes in place become new values: scores += bias and scores[:, 1:] = x are new scores for who reads them later.

Only tensors that the graph made itself, and only where no other view of the same memory is read afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..ports import op_name
from .heads import Shaping
from .index_paths import same_size, shape_of

aten = torch.ops.aten
_PARTS = frozenset({"slice", "select"})  # views whose change is written back by a scatter
_MAYBE = frozenset({"reshape", "contiguous", "to", "flatten", "type_as", "float", "unflatten"})  # views or copies


def without_writes(graph: fx.Graph) -> None:
    """The in-place operations that can be are replaced by their plain form."""
    for node in list(graph.nodes):
        if node.op == "call_function" and _writes(node) and shape_of(node):
            _replace(node)


def without_dead(graph: fx.Graph) -> None:
    """Remove what nobody reads, also operations that could draw random numbers and do not."""
    graph.eliminate_dead_code(lambda node: node.is_impure() and not _draws_nothing(node))


def _draws_nothing(node: fx.Node) -> bool:
    if op_name(node) == "dropout":
        return not (node.args[1] and node.args[2])
    if op_name(node) == "scaled_dot_product_attention":
        return not (node.args[4:5] or (node.kwargs.get("dropout_p"),))[0]
    return False


def _writes(node: fx.Node) -> bool:
    return op_name(node).endswith("_") and not op_name(node).startswith("_")


def _replace(node: fx.Node) -> None:
    path: list[Any] = [node.args[0]]  # from the owner of the memory, through parts of it, to what is written
    while op_name(path[0]) in _PARTS:
        path.insert(0, path[0].args[0])
    if not _owned(path[0]) or _seen_elsewhere(path, node):
        return
    shaping = Shaping(node)
    new = _plain(node, shaping)
    if new is None:
        return
    for part in path[:0:-1]:
        scatter = aten.slice_scatter.default if op_name(part) == "slice" else aten.select_scatter.default
        new = shaping.call(scatter, part.args[0], new, *part.args[1:])
    for user in [u for u in path[0].users if u > node]:
        user.replace_input_with(path[0], new)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _owned(node: Any) -> bool:
    """Whether nobody else can see the memory: made here, and not a view of what another reads."""
    while isinstance(node, fx.Node) and node.op == "call_function" and _shares(node):
        node = node.args[0]
        if not isinstance(node, fx.Node) or len(node.users) > 1:
            return False
    return isinstance(node, fx.Node) and node.op == "call_function"


def _shares(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    returns = node.target._schema.returns
    return bool(returns and returns[0].alias_info is not None) or op_name(node) in _MAYBE


def _seen_elsewhere(path: list[Any], node: fx.Node) -> bool:
    """A view taken before the change and read after it would show the change."""
    if len(path) > 1 and node.users:
        return True
    queue, seen = [path[0]], {path[0], node}
    while queue:
        viewed = queue.pop()
        if viewed is not path[0] and any(user > node for user in viewed.users):
            return True
        for user in viewed.users:
            if user not in seen and user < node and _shares(user):
                seen.add(user)
                queue.append(user)
    return False


def _plain(node: fx.Node, shaping: Shaping) -> fx.Node | None:
    """add_ is add; copy_ is what is copied, in the dtype and shape of where it goes."""
    target, *rest = node.args
    name, overload = op_name(node)[:-1], node.target._overloadname  # type: ignore[union-attr]
    if name == "copy":
        source: Any = rest[0]
        if source.meta["val"].dtype != target.meta["val"].dtype:  # type: ignore[union-attr]
            source = shaping.call(aten.to.dtype, source, target.meta["val"].dtype)  # type: ignore[union-attr]
        one = shape_of(source), shape_of(target)
        if len(one[0]) != len(one[1]) or not all(same_size(a, b) for a, b in zip(*one)):
            source = shaping.call(aten.expand_as.default, source, target)
        return source
    packet = getattr(aten, name, None)
    if packet is None or overload not in packet.overloads() or node.kwargs:
        return None
    return shaping.call(getattr(packet, overload), target, *rest)
