"""Leaf modules (linear, embedding, norm, convolution) put back into a graph as calls of the module under its path.

Capture stamps the nodes of every call of a leaf module that takes one tensor and gives one; where a rewrite left all of
them as they were, they become one `call_module`. So an adapter, a quantized layer or a hook put there later is used.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, fx, nn


@dataclass(frozen=True)
class Stamp:
    """What a node of a leaf's call was when captured: which call, how many nodes it has, the node's own text."""

    call: str
    path: str
    count: int
    text: str


def acts_as(module: nn.Module, kind: type) -> bool:
    """Whether calling a module does what its kind does and nothing else: no forward of its own, no hooks."""
    forward = "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks
    everywhere = nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks
    return type(module) is kind and not forward and not everywhere


@contextmanager
def plain_calls(model: nn.Module) -> Iterator[set[str]]:
    """Collects the paths of leaf modules whose every call took one tensor and gave one."""
    paths = {m: n for n, m in model.named_modules() if n and is_leaf(m)}
    found: set[str] = set()
    others: set[str] = set()

    def watch(path: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        plain = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(output, Tensor)
        (found if plain else others).add(path)

    # on each leaf: torch's global hook leaves a trace of itself that torch.compile warns of ever after
    handles = [m.register_forward_hook(partial(watch, path), with_kwargs=True) for m, path in paths.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        found -= others


def stamp_leaves(graph_module: fx.GraphModule, paths: set[str]) -> None:
    """Mark the nodes of each call of these modules, so that they can be put back after rewriting."""
    for (call, path), nodes in _calls(graph_module.graph):
        if path in paths and _whole(nodes, path) is not None:
            for node in nodes:
                node.meta["leaf"] = Stamp(call, path, len(nodes), stamp_text(node))


def restore_leaves(graph_module: fx.GraphModule, model: nn.Module) -> tuple[str, ...]:
    """Stamped nodes that no rewrite touched become calls of the model's own leaf modules; which these are."""
    groups: dict[str, list[fx.Node]] = {}
    for node in graph_module.graph.nodes:
        if "leaf" in node.meta:
            groups.setdefault(node.meta["leaf"].call, []).append(node)
    for nodes in groups.values():
        stamp: Stamp = nodes[0].meta["leaf"]
        untouched = len(nodes) == stamp.count and all(stamp_text(n) == n.meta["leaf"].text for n in nodes)
        ends = _whole(nodes, stamp.path) if untouched else None
        module = _submodule(model, stamp.path)
        if ends is not None and module is not None and not _has_own_children(graph_module, stamp.path):
            graph_module.add_submodule(stamp.path, module)
            _replace(nodes, *ends, stamp.path)
    for node in list(graph_module.graph.find_nodes(op="get_attr")):
        if not node.users:
            graph_module.graph.erase_node(node)
    graph_module.graph.lint()
    graph_module.recompile()
    return modules_called(graph_module)


def modules_called(graph_module: fx.GraphModule) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(n.target) for n in graph_module.graph.find_nodes(op="call_module")))


def leaves_of(model: nn.Module) -> dict[str, nn.Module]:
    """A model's leaf modules by path."""
    return {path: module for path, module in model.named_modules() if path and is_leaf(module)}


@contextmanager
def in_their_places(model: nn.Module, leaves: Mapping[str, nn.Module], hooks: Container[int]) -> Iterator[None]:
    """Inside, a leaf that was wrapped since (by an adapter), was parametrized or has more than these hooks is a leaf
    again: a trace makes it a call.

    Traced through, an adapter that is switched off or merged later would stay in the graph as it is now.
    """
    parametrized = [(leaf, dict(leaf.__dict__), _unparametrized(leaf)) for leaf in leaves.values()
                    if "parametrizations" in leaf._modules]  # fmt: skip
    wrapped: dict[str, nn.Module] = {}
    for path, leaf in leaves.items():
        now = _submodule(model, path)
        if now is not None and now is not leaf and not is_leaf(now):
            wrapped[path] = now
            model.set_submodule(path, _moved_with(now, leaf))
    listened = [(held, dict(held)) for path in leaves for held in _hooks_added(_submodule(model, path), hooks)]
    for held, all_of_them in listened:
        held.clear()
        held.update((number, hook) for number, hook in all_of_them.items() if number in hooks)
    try:
        yield
    finally:
        for held, all_of_them in listened:
            held.clear()
            held.update(all_of_them)
        for path, module in wrapped.items():
            model.set_submodule(path, module)
        for leaf, attributes, own in parametrized:
            leaf.__dict__.update(attributes)
            leaf.__class__ = own


def _moved_with(now: nn.Module, leaf: nn.Module) -> nn.Module:
    """A leaf as it would be beside what stands in its place: the model may have moved since it left."""
    like = next((p for p in now.parameters() if p.is_floating_point()), None)
    if like is None or any(module is leaf for module in now.modules()):
        return leaf
    return copy.deepcopy(leaf).to(like.device, like.dtype)


def _hooks_added(module: nn.Module | None, known: Container[int]) -> list[dict[int, Any]]:
    """The tables of a module's hooks that hold others than these."""
    tables = (module._forward_pre_hooks, module._forward_hooks) if module is not None else ()
    return [held for held in tables if any(number not in known for number in held)]


def _unparametrized(leaf: nn.Module) -> type[nn.Module]:
    """Take torch's parametrizations off, the weights as they are below them; gives the class that has them."""
    own = type(leaf)
    originals = {name: each.original for name, each in leaf._modules["parametrizations"].items()}  # type: ignore[union-attr,operator]
    leaf.__class__ = own.__bases__[0]
    leaf.__dict__["_parameters"] = {**leaf._parameters, **originals}
    leaf.__dict__["_modules"] = {n: m for n, m in leaf._modules.items() if n != "parametrizations"}
    return own


def is_leaf(module: nn.Module) -> bool:
    """Without children and with parameters, or one that says that it is one: its weights may be codes."""
    own = any(True for _ in module.parameters(recurse=False)) or getattr(module, "is_leaf", False) is True
    return own and not any(True for _ in module.children())


def _calls(graph: fx.Graph) -> Iterable[tuple[tuple[str, str], list[fx.Node]]]:
    groups: dict[tuple[str, str], list[fx.Node]] = {}
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if node.op == "call_function" and stack:
            call, (path, *_) = list(stack.items())[-1]
            groups.setdefault((call, path), []).append(node)
    return groups.items()


def _whole(nodes: Sequence[fx.Node], path: str) -> tuple[fx.Node, fx.Node] | None:
    """The one tensor that enters these nodes and the one that leaves, where all else are the module's own tensors."""
    inside = set(nodes)
    entering: dict[fx.Node, None] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                if str(source.target).rpartition(".")[0] != path:
                    return None
            elif source not in inside and isinstance(source.meta.get("val"), Tensor):
                entering[source] = None
    leaving = [n for n in nodes if any(user not in inside for user in n.users)]
    if len(entering) != 1 or len(leaving) != 1 or not isinstance(leaving[0].meta.get("val"), Tensor):
        return None
    return next(iter(entering)), leaving[0]


def stamp_text(node: fx.Node) -> str:
    """What a node computes, whatever it is applied to."""

    def shown(value: Any) -> Any:
        return "%" if isinstance(value, fx.Node) and value.op != "get_attr" else value

    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), shown)
    return f"{node.target} {args} {kwargs}"


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _has_own_children(graph_module: fx.GraphModule, path: str) -> bool:
    """New tensors of a rewrite live below this module of the graph."""
    holder = _submodule(graph_module, path)
    return holder is not None and any(True for _ in holder.children())


def _replace(nodes: Sequence[fx.Node], entering: fx.Node, leaving: fx.Node, path: str) -> None:
    graph = leaving.graph
    with graph.inserting_after(leaving):
        call = graph.call_module(path, (entering,))
    call.meta = {k: v for k, v in leaving.meta.items() if k != "leaf"}
    leaving.replace_all_uses_with(call)
    for node in reversed(nodes):  # they stand in the graph's order
        graph.erase_node(node)
