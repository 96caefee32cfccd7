"""Removing what computed a mask, writes in place included, once nothing else looks at it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from .aliases import shares_memory

MANY = 64  # followers after which a node is taken to be in use


def erase_unused(graph: fx.Graph, roots: Iterable[fx.Node]) -> None:
    """Erase the roots and what only they needed; checks of a tensor's metadata do not keep it."""
    todo = list(dict.fromkeys(roots))
    while todo:
        n = todo.pop()
        if n._erased or n.op in ("placeholder", "output"):
            continue
        dead = _dead(n)
        inputs = [a for d in dead for a in d.all_input_nodes if a not in dead]
        for d in sorted(dead, reverse=True):
            graph.erase_node(d)
        todo.extend(dict.fromkeys(inputs))


def _dead(n: fx.Node) -> set[fx.Node]:
    """The node with all that follows from it, if none of that can be seen elsewhere; else nothing."""
    found: set[fx.Node] = set()
    todo = [n]
    while todo:
        d = todo.pop()
        if d in found:
            continue
        if len(found) > MANY or d.op == "output" or d.target is torch.ops.reattend.attend.default:
            return set()
        found.add(d)
        todo.extend(d.users)
    return found if all(_harmless(d, found) for d in found) else set()


def _harmless(d: fx.Node, found: set[fx.Node]) -> bool:
    if "_assert_tensor_metadata" in str(d.target) or d.op != "call_function" or not d.is_impure():
        return True
    schema = getattr(d.target, "_schema", None)
    return schema is not None and schema.is_mutable and _memory(d) in found


def _memory(d: fx.Node) -> fx.Node:
    """The node whose memory a view or an operator in place works on."""
    while d.op == "call_function" and d.args and isinstance(d.args[0], fx.Node) and shares_memory(d, d.args[0]):
        d = d.args[0]
    return d
