"""A graph as JSON and back: aten and reattend operators by name, leaf modules by path, and a few operators of Python.

Reading imports nothing and runs nothing that the text names: an operator is looked up among the registered ones, a
module or tensor among those of the model, and every name that ends up in generated code is a plain identifier.
"""

from __future__ import annotations

import keyword
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..leaves import is_leaf
from ..nodes import is_overload, overload_of
from ..refusal import Refused

NAMESPACES = ("aten", "reattend")
MAX_NODES = 200_000
_OPERATOR = re.compile(r"([A-Za-z]\w*)\.([A-Za-z_]\w*)\.([A-Za-z_]\w*)", re.ASCII)
_SEGMENT = re.compile(r"\w+", re.ASCII)
_PYTHON: Mapping[str, Callable[..., Any]] = {
    f"python.{f.__name__}": f
    for f in (
        *(operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv),
        *(operator.mod, operator.neg, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
        *(operator.and_, operator.or_, operator.not_, operator.pow),
        *(torch.sym_max, torch.sym_min, torch.sym_float, torch.sym_int, torch.sym_not, torch.sym_ite),
        *(math.ceil, math.floor, math.trunc),
    )
}
_NAME_OF = {f: name for name, f in _PYTHON.items()}
_CONSTANTS = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
_META = ("site", "mechanism")
_FITS = f"operators of {' and '.join(NAMESPACES)}, leaf modules of the model, {', '.join(_PYTHON)}"


# --- writing ----------------------------------------------------------------------------------------------------------


def graph_json(module: fx.GraphModule) -> list[dict[str, Any]]:
    """One entry a node; refused by name where something in the graph cannot be said in JSON."""
    return [_entry(node, module) for node in module.graph.nodes]


def _entry(node: fx.Node, module: fx.GraphModule) -> dict[str, Any]:
    entry: dict[str, Any] = {"op": node.op, "name": node.name}
    if node.op == "call_function":
        entry["target"] = _operator_name(node)
    elif node.op == "call_method":
        raise Refused(f"a call of the method {node.target!r}", where=f"%{node.name}", fits=_FITS)
    elif node.op != "output":
        entry["target"] = str(node.target)
    if node.op == "call_module" and not is_leaf(module.get_submodule(str(node.target))):
        fits = "merge adapters before saving (merge_and_unload)"
        raise Refused(f"{node.target} is no leaf module any more", where=f"%{node.name}", fits=fits)
    entry["args"] = [value_json(a, node.name) for a in node.args]
    if node.kwargs:
        entry["kwargs"] = {k: value_json(v, node.name) for k, v in node.kwargs.items()}
    return entry | {k: node.meta[k] for k in _META if isinstance(node.meta.get(k), str)}


def _operator_name(node: fx.Node) -> str:
    if is_overload(node.target) and node.target.namespace in NAMESPACES:
        return str(node.target)
    if node.target in _NAME_OF:
        return _NAME_OF[node.target]
    raise Refused(f"operator {node.target}", where=f"%{node.name}", fits=_FITS)


def value_json(value: Any, where: str) -> Any:
    """Lists and plain values as they are; everything else as an object with one key that says what it is."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple):  # torch.Size too
        return {"tuple": [value_json(v, where) for v in value]}
    if isinstance(value, list):
        return [value_json(v, where) for v in value]
    if isinstance(value, slice):
        return {"slice": [value_json(v, where) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, complex):
        return {"complex": [str(value.real), str(value.imag)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, made in _CONSTANTS.items():
        if isinstance(value, made):
            return {kind: str(value).removeprefix("torch.")}
    fits = "numbers, text, lists, tuples, slices, dtypes, devices"
    raise Refused(f"a constant of type {type(value).__name__}", where=f"%{where}", fits=fits)


# --- reading ----------------------------------------------------------------------------------------------------------


def graph_of(entries: Any, model: nn.Module) -> fx.GraphModule:
    """The graph over the model's own tensors and leaf modules; anything else in the text is refused by name."""
    if not isinstance(entries, list) or not entries or len(entries) > MAX_NODES:
        raise Refused("no list of nodes", where="graph", fits=f"1 to {MAX_NODES} nodes")
    graph = fx.Graph()
    held: dict[str, Any] = {}
    made: dict[str, fx.Node] = {}
    for entry in entries:
        node = _node(entry, graph, made, held, model)
        made[entry["name"]] = node
    if entries[-1]["op"] != "output" or any(e["op"] == "output" for e in entries[:-1]):
        raise Refused("the graph does not end with its output", where="graph", fits="a complete file")
    return fx.GraphModule(held, graph).train(model.training)


def _node(entry: Any, graph: fx.Graph, made: Mapping[str, fx.Node], held: dict[str, Any], model: nn.Module) -> fx.Node:
    if not isinstance(entry, dict) or not isinstance(entry.get("args"), list):
        raise Refused(f"a node {str(entry)[:60]!r}", where="graph", fits="objects with op, name, target, args")
    op, name = entry.get("op"), identifier(entry.get("name"), "a node's name")
    if name in made:
        raise Refused(f"two nodes are called {name!r}", where="graph", fits="a name of its own for each node")
    target: Any = entry.get("target")
    match op:
        case "placeholder":
            identifier(target, "an input's name")
        case "get_attr":
            held[target] = tensor_at(model, target)
        case "call_module":
            held[target] = _leaf_at(model, target)
        case "call_function":
            target = operator_of(target)
        case "output":
            target = "output"
        case _:
            raise Refused(f"op {op!r}", where=f"%{name}", fits="placeholder, get_attr, call_module, call_function")
    named = entry.get("kwargs", {})
    if not isinstance(named, dict):
        raise Refused("kwargs that are no object", where=f"%{name}", fits="an object, name to value")
    args = tuple(value_of(a, made) for a in entry["args"])
    kwargs = {identifier(k, f"an argument of %{name}"): value_of(v, made) for k, v in named.items()}
    node = graph.create_node(op, target, args, kwargs, name)
    node.meta.update({k: entry[k] for k in _META if isinstance(entry.get(k), str)})
    return node


def operator_of(name: Any) -> Any:
    """The registered operator of a name; refused where it is of another kind than these graphs are made of."""
    if isinstance(name, str) and name in _PYTHON:
        return _PYTHON[name]
    parts = _OPERATOR.fullmatch(name) if isinstance(name, str) and len(name) < 200 else None
    if parts is None or parts[1] not in NAMESPACES:
        raise Refused(f"operator {str(name)[:80]!r}", where="graph", fits=_FITS)
    found = overload_of(getattr(getattr(torch.ops, parts[1]), parts[2], None), parts[3])
    if found is None:
        raise Refused(f"operator {name}", where="graph", fits=f"one that torch {torch.__version__} and reattend have")
    if any("file" in a.name for a in found._schema.arguments):
        raise Refused(f"operator {name}", where="graph", fits="operators that touch no files")
    return found


def value_of(value: Any, made: Mapping[str, fx.Node]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [value_of(v, made) for v in value]
    kind, inside = next(iter(value.items())) if isinstance(value, dict) and len(value) == 1 else ("", None)
    if kind in ("tuple", "slice", "complex") and isinstance(inside, list):
        parts = [value_of(v, made) for v in inside]
        return tuple(parts) if kind == "tuple" else slice(*parts) if kind == "slice" else complex(*map(float, parts))
    if isinstance(inside, str):
        if kind == "node" and inside in made:
            return made[inside]
        if kind == "float" and inside in ("inf", "-inf", "nan"):
            return float(inside)
        if kind == "device" and re.fullmatch(r"[a-z]+(:\d{1,3})?", inside):
            return torch.device(inside)
        constant = getattr(torch, inside, None) if kind in _CONSTANTS and inside.isidentifier() else None
        if constant is not None and isinstance(constant, _CONSTANTS[kind]):
            return constant
    raise Refused(f"a value {str(value)[:80]}", where="graph", fits="a node before it, numbers, text, dtypes, devices")


# --- names ------------------------------------------------------------------------------------------------------------


def identifier(name: Any, what: str) -> str:
    """The name itself, where it can stand in generated code as it is."""
    fine = isinstance(name, str) and len(name) < 500 and name.isidentifier() and name.isascii()
    if not fine or keyword.iskeyword(name) or name.startswith("__"):
        raise Refused(f"{what} {str(name)[:80]!r}", where="graph", fits="a plain identifier")
    return str(name)


def segments(path: Any) -> list[str]:
    """The parts of a dotted path; refused where one is no plain name."""
    parts = path.split(".") if isinstance(path, str) and len(path) < 1000 else [""]
    if not all(_SEGMENT.fullmatch(p) and not p.startswith("__") for p in parts):
        raise Refused(f"path {str(path)[:80]!r}", where="graph", fits="names joined by dots, as in state_dict()")
    return parts


def module_at(model: nn.Module, path: Any) -> nn.Module:
    """A submodule, looked for among registered modules only."""
    module: nn.Module | None = model
    for part in segments(path) if path != "" else ():
        module = module._modules.get(part) if module is not None else None
    if module is None:
        raise Refused(f"module {path!r}", where="graph", fits=f"a module of this {type(model).__name__}")
    return module


def tensor_at(model: nn.Module, path: Any) -> Tensor:
    """A parameter, buffer or tensor attribute, looked for where modules keep them and nowhere else."""
    *parents, last = segments(path)
    module = module_at(model, ".".join(parents))
    for kept in (module._parameters, module._buffers, vars(module)):
        found = kept.get(last)
        if isinstance(found, Tensor):
            return found
    raise Refused(f"tensor {path!r}", where="graph", fits=f"a parameter or buffer of this {type(model).__name__}")


def _leaf_at(model: nn.Module, path: Any) -> nn.Module:
    module = module_at(model, path)
    if not is_leaf(module):
        fits = "a module without children that has parameters"
        raise Refused(f"call of {path} ({type(module).__name__})", where="graph", fits=fits)
    return module
