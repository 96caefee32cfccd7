"""Raising: every spelling of attention in a graph becomes one `attend` node; what only looks like it gets a reason.

The search starts at every softmax and at every fused attention, flex_attention included. From a softmax it reads
backwards through pointwise steps to a product of queries and keys, and forwards to the product with values; dimensions
are tracked as axes (batch, heads, queries, keys), so that layouts do not matter. docs/raising.md tells the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..nodes import op_name
from ..refusal import Refused
from ..regions import attention_in_regions
from .deferred import normalise_first
from .einsums import split_einsums
from .flex import erase_block_masks, is_flex, place_of_flex
from .found import place_of
from .inplace import make_values
from .layout import erase_idle
from .likeness import forget_likeness
from .near import NearMiss, Unraised, module_path
from .place import Place, write
from .scores import carries_scores
from .sdpa import is_sdpa, place_of_sdpa
from .softmaxes import EXPONENTIALS, softmax_at

__all__ = ["NearMiss", "Raised", "raise_sites"]

SUMS = frozenset({"sum", "norm", "linalg_vector_norm", "cumsum", "mean"})


@dataclass(frozen=True)
class Raised:
    """The attend nodes made, and the places that look like attention and are not."""

    nodes: tuple[fx.Node, ...]
    misses: tuple[NearMiss, ...]


def raise_sites(graph_module: fx.GraphModule) -> Raised:
    """Raise every site in place. Numbers are unchanged, but for rows filled with minus infinity: NaN becomes 0."""
    graph = graph_module.graph
    erase_idle(graph)
    make_values(graph)
    split_einsums(graph)
    forget_likeness(graph)
    erase_idle(graph)
    normalise_first(graph)
    erase_idle(graph)
    made: list[fx.Node] = []
    misses: list[NearMiss] = []
    unraised: list[tuple[fx.Node, NearMiss]] = []
    hidden = dict(attention_in_regions(graph_module))
    misses.extend(NearMiss(module_path(node), node.name, reason) for node, reason in hidden.items())
    for node in list(graph.nodes):
        if node.op != "call_function" or node._erased or node in hidden:
            continue
        try:
            place = _place(node)
            if place is not None:
                made.append(_written(place))
        except Unraised as reason:
            unraised.append((node, NearMiss(module_path(node), reason.node.name, reason.reason)))
    erase_idle(graph)
    misses.extend(miss for node, miss in unraised if not node._erased)  # others were part of what was raised
    erase_block_masks(graph)
    misses.extend(_unnormalised(graph))
    graph.lint()
    graph_module.recompile()
    return Raised(tuple(made), tuple(misses))


def _unnormalised(graph: fx.Graph) -> list[NearMiss]:
    """Exponentials of scores that are summed and yet in no softmax."""
    found = []
    for node in graph.nodes:
        if op_name(node) in EXPONENTIALS and any(op_name(u) in SUMS for u in node.users) and carries_scores(node):
            reason = "exponentials of scores are summed, but they are not divided by their sum"
            found.append(NearMiss(module_path(node), node.name, reason))
    return found


def _place(node: fx.Node) -> Place | None:
    if is_sdpa(node):
        return place_of_sdpa(node)
    if is_flex(node):
        return place_of_flex(node)
    softmax = softmax_at(node)
    return None if softmax is None else place_of(softmax)


def _written(place: Place) -> fx.Node:
    try:
        return write(place)
    except Refused as refused:
        raise Unraised(place.node, str(refused)) from None
