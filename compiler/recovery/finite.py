"""Where the first value that is no number comes from: the node whose inputs are all finite and whose output is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..hosting import hosting, original
from ..signature import Call, forward_signature


class NotFinite(Exception):
    """A loss or gradient that is no number: where, and what was found."""

    def __init__(self, where: str, found: str) -> None:
        super().__init__(f"{where}: {found}")
        self.where, self.found = where, found


def first_not_finite(student: nn.Module, call: Any) -> str:
    """The site, or the module, in which a call's values stop being numbers."""
    state = hosting(student)
    assert state.current is not None
    captured = state.graphs[state.current]
    tensors = captured.inputs(Call.of(forward_signature(original(student)), *call))
    for strange in (torch.isnan, torch.isinf):
        looking = _Looking(student, captured.graph.graph, strange)
        try:
            with torch.no_grad():
                looking.run(*tensors)
        except _Found:
            return looking.place  # the exception's own text was added to on its way through the interpreter
    return "the loss"


class _Found(Exception):
    pass


class _Looking(fx.Interpreter):
    def __init__(self, model: nn.Module, graph: fx.Graph, strange: Callable[[Tensor], Tensor]) -> None:
        super().__init__(model, garbage_collect_values=False, graph=graph)
        self.strange, self.place = strange, ""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op in ("call_function", "call_module", "placeholder") and self._any(value):
            inputs = [self.env.get(source) for source in n.all_input_nodes]
            if not any(self._any(one) for one in inputs if one is not None and not self._weight(n, one)):
                self.place = _place(n)
                raise _Found
        return value

    def _any(self, value: Any) -> bool:
        tensors = [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor) and t.is_floating_point()]
        return any(bool(self.strange(t).any()) for t in tensors)

    def _weight(self, node: fx.Node, value: Any) -> bool:
        """A weight that is no number is no excuse: the node that reads it is the place."""
        return isinstance(value, nn.Parameter)


def _place(node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"the input {node.name}"
    stack = node.meta.get("nn_module_stack") or {}
    inner = str(list(stack.values())[-1][0]) if stack else ""
    return str(node.meta.get("site") or (node.target if node.op == "call_module" else "") or inner or f"%{node.name}")
