"""How many bytes of values a graph holds at most while it runs node by node, read from shapes alone."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from .cost import sizes
from .nodes import op_name

# outputs that are their input in another shape: they hold no bytes of their own, and keep those of their input
_VIEWS = frozenset({"view", "transpose", "permute", "unsqueeze", "squeeze", "expand", "slice", "select",
                    "t", "alias", "detach", "unbind", "split", "chunk", "split_with_sizes", "narrow"})  # fmt: skip


def peak_live_bytes(graph: fx.GraphModule) -> int:
    """The most bytes held at once beyond weights and inputs; a value goes after its last use, its views included."""
    nodes = list(graph.graph.nodes)
    owner = _owners(nodes)
    last: dict[fx.Node, int] = {}
    for index, node in enumerate(nodes):
        for source in (node, *node.all_input_nodes):
            last[owner[source]] = index
    ending: dict[int, list[fx.Node]] = {}
    for node, index in last.items():
        ending.setdefault(index, []).append(node)
    held, most = 0, 0
    size = {n: _own_bytes(n) for n in nodes if owner[n] is n and n.op in ("call_function", "call_module")}
    for index, node in enumerate(nodes):
        held += size.get(node, 0)
        most = max(most, held)
        held -= sum(size.get(n, 0) for n in ending.get(index, ()))
    return most


def _owners(nodes: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Whose bytes a node's value stands in."""
    owner: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        owner[node] = owner[source] if source is not None and _is_view(node, source) else node
    return owner


def _is_view(node: fx.Node, source: fx.Node) -> bool:
    name = op_name(node)
    if name in _VIEWS or str(node.target).endswith("getitem>") or getattr(node.target, "__name__", "") == "getitem":
        return True
    value, given = node.meta.get("val"), source.meta.get("val")
    if name in ("reshape", "contiguous", "dropout", "to") and isinstance(value, Tensor) and isinstance(given, Tensor):
        return name == "dropout" or (value.dtype == given.dtype and _laid_out(given))
    return False


def _laid_out(value: Tensor) -> bool:
    """Whether its rows stand one behind the other, so that another shape needs no copy."""
    try:
        return bool(value.is_contiguous())
    except RuntimeError:  # torch cannot say it of sizes that depend on data
        return False


def _own_bytes(node: fx.Node) -> int:
    value: Any = node.meta.get("val")
    outputs = [t for t in (value if isinstance(value, list | tuple) else [value]) if isinstance(t, torch.Tensor)]
    return sum(prod(sizes(t)) * t.element_size() for t in outputs)
