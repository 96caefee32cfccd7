"""Raising: every spelling of attention in a graph becomes one `attend` node; what comes near and is not says why.

No list of patterns: from each softmax the chain is read backwards, element by element, into one expression.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..ports import op_name
from ..refusal import Refused
from .chains import products_behind, raise_chain
from .in_place import without_dead, without_writes
from .reading import Unreadable
from .sdpa import raise_sdpa
from .softmaxes import almost_softmax, as_softmax


@dataclass(frozen=True)
class NearMiss:
    """A place that looks like attention and was left alone."""

    where: str
    node: str
    reason: str


@dataclass(frozen=True)
class Raised:
    nodes: tuple[fx.Node, ...]
    misses: tuple[NearMiss, ...]


def raise_sites(graph_module: fx.GraphModule, *, recompile: bool = True) -> Raised:
    """Raise in place; the graph stays valid, dead code is gone, numbers are the same."""
    raised: list[fx.Node] = []
    misses: list[NearMiss] = []
    graph = graph_module.graph
    without_dead(graph)
    without_writes(graph)
    without_dead(graph)
    for node in list(graph.nodes):
        if op_name(node) == "scaled_dot_product_attention":
            try:
                raised.append(raise_sdpa(node))
            except (Unreadable, Refused) as reason:
                misses.append(_miss(node, str(reason)))
            continue
        softmax = as_softmax(node)
        if softmax is None:
            almost = almost_softmax(node)
            misses += [_miss(node, almost)] if almost else []
            continue
        behind = products_behind(softmax)
        if not behind:
            misses.append(_miss(node, "no product with values behind the softmax"))
        elif len(behind) > 1:
            misses.append(_miss(node, f"its weights meet {len(behind)} products: {', '.join(b.name for b in behind)}"))
        else:
            try:
                raised.append(raise_chain(softmax, behind[0]))
            except (Unreadable, Refused) as reason:
                misses.append(_miss(node, str(reason)))
    without_dead(graph)
    graph.lint()
    if recompile:
        graph_module.recompile()
    return Raised(tuple(raised), tuple(misses))


def _miss(node: fx.Node, reason: str) -> NearMiss:
    stack = node.meta.get("nn_module_stack") or {}
    where = str(list(stack.values())[-1][0]) if stack else ""
    return NearMiss(where, node.name, reason)
