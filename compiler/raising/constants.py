"""Tensors of one element that are the same in every run: the numbers that a graph multiplies and fills with."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from ..nodes import op_name
from ..plain_graph import CONSTANTS
from .layout import CASTS, KEEPING, VIEWS, tensor_of

COMPUTED = frozenset({"sqrt", "rsqrt", "mul", "div", "pow", "neg", "reciprocal", "add", "sub", "exp", "log"})
COMPUTED |= VIEWS | KEEPING | CASTS | {"expand"}
MADE = frozenset({"full", "scalar_tensor", "zeros", "ones", "full_like", "zeros_like", "ones_like"})


def constant(node: Any, *, buffers: bool = False) -> float | None:
    """The number a node stands for, or None. Buffers can be loaded anew, so they count only if asked for."""
    if isinstance(node, bool | int | float):
        return node
    value = tensor_of(node)
    if value is None or (not all(s == 1 for s in value.shape) and op_name(node) not in ("expand", *MADE)):
        return None
    found = _value(node, buffers)
    return None if found is None else found.item()


def _value(node: Any, buffers: bool) -> torch.Tensor | None:
    """The tensor itself, one element of it where it was made by filling."""
    if node.op == "get_attr":
        return _stored(node, buffers)
    name = op_name(node)
    if name in MADE:
        filled = {"zeros": 0, "ones": 1, "zeros_like": 0, "ones_like": 1}.get(name)
        fill = filled if filled is not None else node.args[0 if name == "scalar_tensor" else 1]
        if isinstance(fill, bool | int | float):
            return torch.tensor(fill, dtype=tensor_of(node).dtype)
        return None
    if name in ("expand", *VIEWS, *KEEPING):
        return _value(node.args[0], buffers) if isinstance(node.args[0], fx.Node) else None
    if name in CASTS:
        inner = _value(node.args[0], buffers)
        return None if inner is None else inner.to(tensor_of(node).dtype)
    if name not in COMPUTED or node.kwargs:
        return None
    parts = [_value(a, buffers) if isinstance(a, fx.Node) and tensor_of(a) is not None else a for a in node.args]
    if any(p is None or isinstance(p, fx.Node | list | tuple) for p in parts):
        return None
    return node.target(*parts)


def _stored(node: fx.Node, buffers: bool) -> torch.Tensor | None:
    target, module = str(node.target), node.graph.owning_module
    if module is None or not (buffers or target.startswith((CONSTANTS, "lifted_tensor", "_tensor_constant"))):
        return None
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    if isinstance(value, nn.Parameter) or value.numel() != 1 or value.device.type == "meta":
        return None
    if hasattr(value, "fake_mode"):
        return None
    return value.detach().reshape(())
