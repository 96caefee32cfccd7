"""An exported program as a plain graph: tensors under the model's own names, constants as buffers, no asserts left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind

from .draft import Draft
from .refusal import Refused

CONSTANTS = "_reattend_constants"
_CHECKS = ("_assert", "sym_constrain_range", "_assert_async")
_NOWHERE = "_empty_nn_module_stack_from_metadata_hook"
_OWN = {InputKind.PARAMETER, InputKind.BUFFER}
# running mean and variance, written where the flag is set: their schemas do not say so
_NORMS = {"batch_norm": (3, 4, 5), "instance_norm": (3, 4, 5)}
_RESHAPED = (
    "view reshape _unsafe_view expand expand_as slice select unsqueeze squeeze contiguous clone flatten unflatten "
    "sym_size to _to_copy alias detach detach_ lift_fresh_copy permute transpose"
)
_RESHAPING = frozenset(_RESHAPED.split())
            if source.op == "get_attr":
                found[str(source.target)] = None
    return tuple(found)


def operations(module: fx.GraphModule) -> tuple[str, ...]:
    """What is computed where, reshaping aside: equal for two traces where the model took the same branches."""
    found = []
    for node in module.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._opname not in _RESHAPING:
            stack = node.meta.get("nn_module_stack") or {"": ("", "")}
            constants = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, float | bool)]
            found.append(f"{list(stack.values())[-1][0]} {node.target} {constants}")
    return tuple(found)


def _written_by(node: fx.Node) -> list[fx.Node]:
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return []
    marked = [a for a, s in zip(node.args, schema.arguments) if s.alias_info is not None and s.alias_info.is_write]
    name = schema.name.removeprefix("aten::")
    if name in _NORMS:
        *running, flag = _NORMS[name]
        if node.args[flag]:
            marked += [node.args[k] for k in running]
    return [a for a in marked if isinstance(a, fx.Node)]


def _base(node: fx.Node) -> fx.Node:
    """Whose memory a node's value is, through views."""
    while node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        returns = node.target._schema.returns
        if not (returns and returns[0].alias_info is not None and node.args and isinstance(node.args[0], fx.Node)):
            return node
        node = node.args[0]
    return node
