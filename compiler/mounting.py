"""A captured graph's tensors and modules on a hosted model's tree: both name the same objects."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from .capture import Captured
from .plain_graph import CONSTANTS


def mount(captured: Captured, model: nn.Module) -> None:
    """What is new in the graph joins the model, all else is the model's."""
    named = {n.target for n in captured.graph.graph.find_nodes(op="get_attr") if n.target.startswith(f"{CONSTANTS}.")}
    values = {target: _find(captured.graph, target) for target in named}  # before one takes the name of another
    for node in captured.graph.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            if node.target in values:
                node.target = _constant(node.target, values[node.target], captured.graph, model)
            _share(node.target, captured.graph, model)
    for name in captured.buffers:
        _share(name, captured.graph, model)
    captured.graph.recompile()


def _share(target: str, graph: fx.GraphModule, model: nn.Module) -> None:
    mine, theirs = _find(model, target), _find(graph, target)
    if mine is None:
        place_at(model, target, theirs)
    elif mine is not theirs:
        place_at(graph, target, mine)


def _constant(target: str, value: Any, graph: fx.GraphModule, model: nn.Module) -> str:
    """A name for a constant of this graph: that of an equal one, or the next free one."""
    known = _find(model, CONSTANTS)
    held: dict[str, Any] = dict(known.named_buffers()) if known is not None else {}
    same = next((n for n, other in held.items() if other is value or _equal(other, value)), None)
    name = f"{CONSTANTS}.{same or f'c{len(held)}'}"
    if name != target and _find(graph, name) is not value:
        place_at(graph, name, value)
    if same is None:
        place_at(model, name, value)
    return name


def _equal(one: Any, other: Any) -> bool:
    real = isinstance(one, Tensor) and isinstance(other, Tensor) and type(one) is type(other) is Tensor
    if not real or one.dtype is not other.dtype or one.shape != other.shape or one.device != other.device:
        return False
    return not one.is_meta and torch.equal(one, other)


def _find(root: nn.Module, target: str) -> Any:
    found: Any = root
    for part in target.split("."):
        found = getattr(found, part, None)
        if found is None:
            return None
    return found


def place_at(root: nn.Module, target: str, value: Any) -> None:
    *parents, last = target.split(".")
    module = root
    for part in parents:
        if not isinstance(getattr(module, part, None), nn.Module):
            module.add_module(part, nn.Module().train(root.training))
        module = getattr(module, part)
    if isinstance(value, nn.Module):
        module.add_module(last, value)
    elif isinstance(value, nn.Parameter):
        module.register_parameter(last, value)
    elif isinstance(value, Tensor):
        module.__dict__.pop(last, None)
        module.register_buffer(last, value, persistent=not target.startswith(f"{CONSTANTS}."))
    else:
        setattr(module, last, value)
