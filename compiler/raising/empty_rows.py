"""Whether a mask can leave a query without a key: there a finite fill means equal weights, and they have to stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .axes import Group, Groups, leaves
from .layout import tensor_of


def may_empty(mask: fx.Node, groups: Groups, columns: Group, *, keeps: bool) -> bool:
    """One made of constants, of one size, is looked at; of any other only a call can tell."""
    if any(not isinstance(size, int) for size in tensor_of(mask).shape):
        return True
    try:
        value = _value(mask, {})
    except _Unknown:
        return True
    if value.device.type == "meta":
        return False
    kept = value != 0 if keeps else value == 0
    along = [d for d, g in enumerate(groups) if set(leaves(g)) & set(leaves(columns))]
    return not bool((kept.any(along) if along else kept).all())


class _Unknown(Exception):
    """A value that only a call of the model tells."""


def _value(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """What a node holds whatever the model is called with, at the sizes of the example call."""
    if node in known:
        return known[node]
    fake = node.meta.get("val")
    if fake is not None and tensor_of(node) is None and not isinstance(fake, list | tuple):
        known[node] = fake.node.hint if hasattr(fake, "node") else fake
        if known[node] is None:
            raise _Unknown  # a size that only the data tell
    elif node.op == "get_attr":
        known[node] = _stored(node)
    elif node.op == "call_function" and not node.is_impure():
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: _value(n, known))
        known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    else:
        raise _Unknown
    return known[node]


def _stored(node: fx.Node) -> Tensor:
    value: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    if not isinstance(value, Tensor) or isinstance(value, torch.nn.Parameter):
        raise _Unknown
    return value
