"""A graph as a picklable value: its nodes as they stand, never traced again (which would run what has no inputs)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from .nodes import is_overload

_META = ("nn_module_stack", "leaf", "site", "mechanism")  # shapes are not kept: they belong to one tracing session


@dataclass(frozen=True)
class Ref:
    """A node as an argument of another."""

    name: str


@dataclass(frozen=True)
class Row:
    """One node; an operator is named by its text."""

    op: str
    name: str
    target: Any
    args: Any
    kwargs: Any
    meta: dict[str, Any]


@dataclass(frozen=True)
class GraphState:
    rows: tuple[Row, ...]
    held: dict[str, Any]  # the tensors and modules that the graph names
    training: bool


def state_of(module: fx.GraphModule) -> GraphState:
    held = {
        str(n.target): _find(module, str(n.target)) for n in module.graph.nodes if n.op in ("get_attr", "call_module")
    }
    return GraphState(tuple(map(_row, module.graph.nodes)), held, module.training)


def graph_from(state: GraphState) -> fx.GraphModule:
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    for row in state.rows:
        args, kwargs = _mapped((row.args, row.kwargs), lambda v: made[v.name] if isinstance(v, Ref) else v)
        node = graph.create_node(row.op, _operator(row.target), args, kwargs, row.name)
        node.meta.update(row.meta)
        made[row.name] = node
    return fx.GraphModule(state.held, graph).train(state.training)


def _row(node: fx.Node) -> Row:
    args, kwargs = _mapped((node.args, node.kwargs), lambda v: Ref(v.name) if isinstance(v, fx.Node) else v)
    target = f"op:{node.target}" if is_overload(node.target) else node.target
    return Row(node.op, node.name, target, args, kwargs, {k: v for k, v in node.meta.items() if k in _META})


def _operator(target: Any) -> Any:
    if isinstance(target, str) and target.startswith("op:"):
        return functools.reduce(getattr, target.removeprefix("op:").split("."), torch.ops)
    return target


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, list):  # fx holds lists of a type of its own
        return [_mapped(v, change) for v in value]
    if isinstance(value, tuple):
        return tuple(_mapped(v, change) for v in value)
    if isinstance(value, dict):
        return {k: _mapped(v, change) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(*(_mapped(v, change) for v in (value.start, value.stop, value.step)))
    return change(value)


def _find(root: nn.Module, target: str) -> Any:
    return functools.reduce(getattr, target.split("."), root)
