"""Parts of a graph that stand in a module of their own: autocast and grad-mode regions, branches, mapped functions.

A region that changes nothing is opened: its nodes join the graph. Any other stays closed, and what attends in it is
named.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._functorch import predispatch

from .nodes import args_of, higher_order_name, op_name

ATTENDING = frozenset({"softmax", "_softmax", "_safe_softmax", "log_softmax", "scaled_dot_product_attention"})
_NESTING = {"_vmap_increment_nesting": 1, "_vmap_decrement_nesting": -1}
_CHECKS = "_assert_tensor_metadata"
for _name in ("lazy_load_decompositions", "_vmap_increment_nesting", "_vmap_decrement_nesting"):
    if (_function := getattr(predispatch, _name, None)) is not None:
        fx.node.has_side_effect(_function)  # nothing reads them, and without them torch.vmap's nodes cannot run


def open_regions(module: fx.GraphModule) -> None:
    """Put the nodes of every region that changes nothing in its place."""
    for node in list(module.graph.nodes):
        found = _submodule(module, node)
        if found is not None and _changes_nothing(node):
            open_regions(found[0])
            _inline(module, node, *found)
    module.graph.lint()
    module.recompile()


def attention_in_regions(module: fx.GraphModule) -> Iterator[tuple[fx.Node, str]]:
    """Nodes in which something attends that no pass over the graph sees, and what they are."""
    depth = 0
    for node in module.graph.nodes:
        kind = getattr(node.target, "__name__", str(node.target))
        depth += _NESTING.get(kind, 0)
        if depth and _attends(node):
            yield node, "it stands inside torch.vmap, written for one example; write the batch out"
        found = _submodule(module, node)
        if found is not None and any(_attends(inner) for inner in found[0].graph.nodes):
            yield node, f"it stands inside a region of its own ({kind}); attention is found outside of such"


def mapped(graph: fx.Graph) -> list[list[fx.Node]]:
    """The nodes of every torch.vmap, from where it begins to where it ends."""
    found: list[list[fx.Node]] = []
    depth = 0
    for node in graph.nodes:
        change = _NESTING.get(getattr(node.target, "__name__", ""), 0)
        if change > 0 and depth == 0:
            found.append([])
        depth += change
        if depth or change:
            found[-1].append(node)
    return found


def _attends(node: fx.Node) -> bool:
    return op_name(node) in ATTENDING


def _submodule(module: fx.GraphModule, node: fx.Node) -> tuple[fx.GraphModule, tuple[Any, ...]] | None:
    """The graph that a higher-order operator runs, and what it is given."""
    if node.op != "call_function" or not higher_order_name(node):
        return None
    for position, argument in enumerate(node.args):
        if isinstance(argument, fx.Node) and argument.op == "get_attr":
            inner = getattr(module, str(argument.target), None)
            if isinstance(inner, fx.GraphModule):
                return inner, node.args[position + 1 :]
    return None


def _changes_nothing(node: fx.Node) -> bool:
    """Autocast that is off, as around it, or on for another kind of device; gradients allowed, as they are anyhow."""
    kind = getattr(node.target, "__name__", "")
    if kind == "wrap_with_autocast":
        device, _, enabled = node.args[:3]
        tensors = [n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        off = not enabled and not torch.is_autocast_enabled(str(device))  # a graph runs under the autocast of its call
        return off or all(t.device.type != device for t in tensors)
    return kind == "wrap_with_set_grad_enabled" and bool(node.args[0])


def _inline(module: fx.GraphModule, node: fx.Node, inner: fx.GraphModule, given: tuple[Any, ...]) -> None:
    placed = dict(zip(inner.graph.find_nodes(op="placeholder"), given, strict=True))
    results: tuple[Any, ...] = ()
    with module.graph.inserting_before(node):
        for part in inner.graph.nodes:
            if part.op == "output":
                results = tuple(placed[r] if isinstance(r, fx.Node) else r for r in part.args[0])
            elif part.op == "get_attr":
                name = f"{node.name}_{part.target}".replace(".", "_")
                module.add_submodule(name, getattr(inner, str(part.target)))
                placed[part] = module.graph.get_attr(name)
            elif part.op != "placeholder" and _CHECKS not in str(part.target):
                placed[part] = module.graph.node_copy(part, lambda n: placed[n])
    for user in list(node.users):
        if user.target is not operator.getitem:
            raise RuntimeError(f"{node.name} is used by {user.name}")
        user.replace_all_uses_with(results[args_of(user)[1]])
        module.graph.erase_node(user)
    module.graph.erase_node(node)
