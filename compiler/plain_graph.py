"""An exported program as a plain graph: tensors under the model's own names, constants as buffers, no asserts left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind

from .draft import Draft
from .nodes import is_overload, op_name
from .refusal import Refused, Uncapturable

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


def plain(program: torch.export.ExportedProgram, model: nn.Module, inputs: Sequence[str]) -> fx.GraphModule:
    """The program's graph over the model's own parameters and buffers, its inputs named after the arguments."""
    graph = fx.Graph()
    root: dict[str, Any] = {}
    specs = {s.arg.name: s for s in program.graph_signature.input_specs}
    placed: dict[fx.Node, fx.Node] = {}
    kept: dict[fx.Node, str] = {}
    shown: dict[str, fx.Node] = {}
    names, aliases = iter(inputs), _aliases(model)
    for node in program.graph.nodes:
        if node.op == "placeholder" and specs[node.name].kind is InputKind.USER_INPUT:
            placed[node] = graph.placeholder(_identifier(next(names)))
            placed[node].meta = _meta(node)
        elif node.op == "placeholder":
            kept[node] = _own_name(specs[node.name], program, model, root)
        elif node.op == "get_attr":
            root[node.target] = _resolve(program.graph_module, node.target)
            placed[node] = graph.node_copy(node)
        elif not (node.op == "call_function" and any(c in str(node.target) for c in _CHECKS) and not node.users):
            for source in node.all_input_nodes:
                if source in kept:
                    name = _nearest_name(kept[source], node, aliases)
                    root[name] = root[kept[source]]
                    if name not in shown:
                        shown[name] = graph.get_attr(name)
                        shown[name].meta = _meta(source)
                    placed[source] = shown[name]
            placed[node] = graph.node_copy(node, lambda n: placed[n])
            placed[node].meta = _meta(node)
    used = {n.target for n in graph.nodes if n.op == "get_attr"}
    taken = sorted({str(t).partition(".")[0] for t in used} & _TAKEN)
    if taken:
        found = f"a part called {taken[0]}, a name that an fx.GraphModule has for itself"
        raise Uncapturable(found, where=type(model).__name__, fits="another name; as an island it is captured")
    module = Draft({t: v for t, v in root.items() if t in used}, graph)
    return module.train(model.training)


_TAKEN = frozenset({*dir(fx.GraphModule), "graph", "meta"} - set(dir(nn.Module)))


def _aliases(model: nn.Module) -> dict[str, set[str]]:
    """All names of each tied parameter, by every one of them."""
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return {name: group for group in groups.values() if len(group) > 1 for name in group}


def _nearest_name(name: str, user: fx.Node, aliases: dict[str, set[str]]) -> str:
    """Of a tied parameter's names the one in the module that uses it."""
    stack = user.meta.get("nn_module_stack")
    if not stack or name not in aliases:
        return name
    inside = f"{list(stack.values())[-1][0]}.{name.rpartition('.')[2]}"
    return inside if inside in aliases[name] else name


def _own_name(spec: Any, program: Any, model: nn.Module, root: dict[str, Any]) -> str:
    """Where a lifted tensor lives: the model's own attribute, or one more constant."""
    target: str = spec.target
    if spec.kind in _OWN:
        root[target] = _resolve(model, target)
        return target
    value = program.constants[target]
    if _same(model, target, value):
        root[target] = value
        return target
    name = f"{CONSTANTS}.c{sum(t.startswith(CONSTANTS) for t in root)}"
    root[name] = value
    return name


def _same(model: nn.Module, target: str, value: Any) -> bool:
    try:
        return _resolve(model, target) is value
    except AttributeError:
        return False


def _resolve(module: Any, target: str) -> Any:
    for part in target.split("."):
        module = getattr(module, part)
    return module


def _meta(node: fx.Node) -> dict[str, Any]:
    meta = {k: v for k, v in node.meta.items() if k in ("val", "nn_module_stack", "stack_trace")}
    stack = meta.get("nn_module_stack")
    if stack:
        meta["nn_module_stack"] = {k: v for k, v in stack.items() if _NOWHERE not in k}
    return meta


def _identifier(path: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in path)


def written(module: fx.GraphModule) -> tuple[str, ...]:
    """Buffers that running the graph writes to; a graph that writes to its inputs is refused."""
    found: dict[str, None] = {}
    for node in module.graph.nodes:
        for target in _written_by(node):
            source = _base(target)
            if source.op == "placeholder":
                line = (node.meta.get("stack_trace") or "").strip().rsplit("File ", 1)[-1]
                raise Refused(
                    f"the model writes to its input {source.name} ({node.target})",
                    where=" ".join(line.split()),
                    fits="a forward that leaves its tensors alone, e.g. x = x + 1 instead of x += 1",
                )
            if source.op == "get_attr":
                found[str(source.target)] = None
    return tuple(found)


def without_growth(module: fx.GraphModule) -> tuple[str, ...]:
    """Takes away writes of buffers that a call makes larger (tables of positions): each such call makes its own."""
    found = []
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
        kept, made = node.args[:2]
        if kept.op == "get_attr" and not node.users and not _fits_into(made.meta["val"], kept.meta["val"]):
            found.append(str(kept.target))
            module.graph.erase_node(node)
    return tuple(found)


def _fits_into(value: Any, buffer: Any) -> bool:
    sizes = [(str(a), str(b)) for a, b in zip(value.shape[::-1], buffer.shape[::-1])]
    return value.ndim <= buffer.ndim and all(a in ("1", b) for a, b in sizes)


def operations(module: fx.GraphModule) -> tuple[str, ...]:
    """What is computed where, reshaping aside: equal for two traces where the model took the same branches."""
    found = []
    for node in module.graph.nodes:
        if is_overload(node.target) and op_name(node) not in _RESHAPING:
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
    while node.op == "call_function" and is_overload(node.target):
        returns = node.target._schema.returns
        if not (returns and returns[0].alias_info is not None and node.args and isinstance(node.args[0], fx.Node)):
            return node
        node = node.args[0]
    return node
