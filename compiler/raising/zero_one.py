"""Whether a tensor of numbers holds nothing but zeros and ones, so that a factor of it is a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from ..nodes import op_name
from .constants import constant
from .layout import CASTS, KEEPING, TURNS, VIEWS, tensor_of

LIMIT = 12  # steps back
MADE = frozenset({"ones", "zeros", "ones_like", "zeros_like", "new_ones", "new_zeros", "eye"})
CUT = frozenset({"tril", "triu", "expand", "expand_as", "slice", "select"})
JOINED = frozenset({"mul", "minimum", "maximum"})


def is_zero_one(node: Any, limit: int = LIMIT) -> bool:
    value = tensor_of(node)
    if value is None or not limit:
        return False
    name = op_name(node)
    if value.dtype == torch.bool or name in MADE:
        return True
    if node.op == "get_attr":
        return _stored_zero_one(node)
    if name in VIEWS | TURNS | KEEPING | CASTS | CUT:
        return is_zero_one(node.args[0], limit - 1)
    if name in JOINED:
        return all(is_zero_one(a, limit - 1) or constant(a) in (0, 1) for a in node.args[:2])
    if name in ("sub", "rsub"):
        one, other = node.args[:2] if name == "sub" else node.args[1::-1]
        return constant(one) == 1 and not node.kwargs and len(node.args) == 2 and is_zero_one(other, limit - 1)
    return name in ("full", "full_like", "new_full") and constant(node) in (0, 1)


def _stored_zero_one(node: fx.Node) -> bool:
    value: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    if not isinstance(value, torch.Tensor) or isinstance(value, nn.Parameter) or hasattr(value, "fake_mode"):
        return False
    return value.device.type != "meta" and bool(((value == 0) | (value == 1)).all())
