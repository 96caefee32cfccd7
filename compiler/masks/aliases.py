"""Which tensors of a graph are written in place, and which nodes compute the same thing."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..nodes import draws, writes

METADATA_ONLY = (torch.ops.aten.detach_.default,)  # written to, by the schema, and no value changes


def shares_memory(user: fx.Node, source: fx.Node) -> bool:
    """Whether an operator gives a view of a tensor, or writes into it."""
    schema = getattr(user.target, "_schema", None) if user.op == "call_function" else None
    if schema is None:
        return user.op == "call_function"  # an item of a list of views
    for argument, value in zip(schema.arguments, user.args, strict=False):
        given = value if isinstance(value, list | tuple) else [value]
        if argument.alias_info is not None and any(a is source for a in given):
            return True
    return False


def nodes_written_in_place(graph: fx.Graph) -> frozenset[fx.Node]:
    """Every node that shares memory with something that an operator writes into."""
    parent: dict[fx.Node, fx.Node] = {}
    written: list[fx.Node] = []

    def root(n: fx.Node) -> fx.Node:
        while n in parent:
            n = parent[n]
        return n

    for n in graph.nodes:
        schema = getattr(n.target, "_schema", None) if n.op == "call_function" else None
        if schema is None:
            if n.op == "call_function":  # an item of a list of views
                _join(n, n.all_input_nodes, parent, root)
            continue
        shared: list[fx.Node] = []
        for argument, value in zip(schema.arguments, n.args, strict=False):
            if argument.alias_info is None:
                continue
            nodes = [a for a in (value if isinstance(value, list | tuple) else [value]) if isinstance(a, fx.Node)]
            shared.extend(nodes)
            if argument.alias_info.is_write and n.target not in METADATA_ONLY:
                written.extend(nodes)
        _join(n, shared, parent, root)
    roots = {root(n) for n in written}
    return frozenset(n for n in graph.nodes if roots and root(n) in roots)


def _join(n: fx.Node, shared: list[fx.Node], parent: dict[fx.Node, fx.Node], root: Any) -> None:
    for other in shared:
        a, b = root(n), root(other)
        if a is not b:
            parent[a] = b


def structure_keys(graph: fx.Graph) -> dict[fx.Node, int]:
    """A number per node, equal for nodes that apply the same operators to the same inputs."""
    numbers: dict[Any, int] = {}
    keys: dict[fx.Node, int] = {}
    for n in graph.nodes:
        key: Any = n
        if n.op == "get_attr":
            key = ("get_attr", n.target)
        elif n.op == "call_function" and not writes(n) and not draws(n):
            try:
                key = (n.target, _frozen(n.args, keys), _frozen(n.kwargs, keys))
                hash(key)
            except TypeError:
                key = n
        keys[n] = numbers.setdefault(key, len(numbers))
    return keys


def _frozen(value: Any, keys: dict[fx.Node, int]) -> Any:
    if isinstance(value, fx.Node):
        return ("node", keys[value])
    if isinstance(value, list | tuple):
        return tuple(_frozen(v, keys) for v in value)
    if isinstance(value, dict):
        return tuple((k, _frozen(v, keys)) for k, v in sorted(value.items()))
    return (type(value).__name__, str(value) if isinstance(value, slice | torch.SymInt) else value)
