"""What belongs to a captured graph beside its nodes, as JSON: the call's layout, the sizes it holds for, its outputs.

A layout names types. Those of Python and of the model's own outputs and caches are looked up among what is loaded
already; nothing is imported. Conditions on sizes are read as arithmetic on sizes and refused where they are more.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

from torch import nn

from ..capture import Captured
from ..containers import Layout, is_cache
from ..ranges import Sizes, Symbol
from ..refusal import Refused
from ..signature import SignatureKey
from .graph_json import graph_json, graph_of, identifier, tensor_at, value_json, value_of

KINDS = ("tensor", "value", "items", "mapping", "fields", "object", "argument")
_BUILT_IN: Mapping[str, type] = {
    **{f"builtins.{t.__name__}": t for t in (list, tuple, dict, set)},
    "collections.OrderedDict": OrderedDict,
}
_SIZE = re.compile(r"L\['tensors'\]\[\d{1,4}\]\.size\(\)\[\d{1,2}\]")
_ARITHMETIC = (
    *(ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.BinOp, ast.Compare),
    *(ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Div, ast.Mod, ast.Load, ast.Name),
    *(ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE),
)
_CALLS = ("min", "max", "math.ceil", "math.floor", "math.trunc", "torch.sym_max", "torch.sym_min", "torch.sym_float")


# --- writing ----------------------------------------------------------------------------------------------------------


def captured_json(captured: Captured) -> dict[str, Any]:
    """A captured and rewritten graph; refused where a constant or type of the call cannot be said in JSON."""
    key, dims = captured.key, captured.dims
    return {
        "call": {
            "arguments": [[n, _layout_json(layout)] for n, layout in key.arguments],
            "tensors": list(key.tensors),
            "together": list(key.together),
            "setting": list(key.setting),
        },
        "layouts": [[n, _layout_json(layout)] for n, layout in captured.layouts],
        "output": _layout_json(captured.output),
        "grown": [[n, _layout_json(layout)] for n, layout in captured.grown],
        "sizes": {
            "inputs": list(dims.inputs),
            "shapes": [list(shape) for shape in dims.shapes],
            "dtypes": [str(d).removeprefix("torch.") for d in dims.dtypes],
            "symbols": [[s.name, s.least, s.most] for s in dims.symbols.values()],
            "guards": list(dims.guards),
        },
        **{n: list(getattr(captured, n)) for n in _TEXTS},
        "graph": graph_json(captured.graph),
    }


_TEXTS = ("writes", "notes", "losses", "buffers", "traces", "operations")


def _layout_json(layout: Layout) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": layout.kind}
    if layout.type is not None:
        found["type"] = f"{layout.type.__module__}.{layout.type.__qualname__}"
    if layout.names:
        found["names"] = [value_json(n, "the call") for n in layout.names]
    if layout.parts:
        found["parts"] = [_layout_json(p) for p in layout.parts]
    if layout.value is not None:
        found["value"] = value_json(layout.value, "the call")
    return found


# --- reading ----------------------------------------------------------------------------------------------------------


def captured_of(entry: Any, model: nn.Module) -> Captured:
    """The captured graph over a model; a file in which something is missing is refused by what is missing."""
    try:
        call, sizes = entry["call"], entry["sizes"]
        key = SignatureKey(
            _layouts(call["arguments"], model),
            _texts(call["tensors"]),
            tuple(map(bool, call["together"])),
            _texts(call["setting"]),
        )
        graph = graph_of(entry["graph"], model)
        texts: dict[str, Any] = {n: _texts(entry[n]) for n in _TEXTS}
        for name in (*texts["writes"], *texts["buffers"]):
            tensor_at(model, name)
        captured = Captured(
            graph=graph,
            key=key,
            layouts=_layouts(entry["layouts"], model),
            output=_layout(entry["output"], model),
            grown=_layouts(entry["grown"], model),
            dims=_sizes(sizes),
            **texts,
        )
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise Refused(f"a signature that is not whole ({said[:100]})", where="graphs", fits="a complete file") from None
    _counts(captured)
    return captured


def _counts(captured: Captured) -> None:
    """Inputs and outputs are as many as the layouts say."""
    inputs = sum(layout.count for _, layout in captured.layouts)
    taken = len(list(captured.graph.graph.find_nodes(op="placeholder")))
    results: Any = next(iter(captured.graph.graph.find_nodes(op="output"))).args
    given = len(results[0]) if results and isinstance(results[0], list | tuple) else -1
    wanted = captured.output.count + sum(layout.count for _, layout in captured.grown) + captured.extra
    if not inputs == taken == len(captured.dims.shapes) == len(captured.dims.inputs) or given != wanted:
        found = f"{taken} inputs and {given} outputs where the call has {inputs} and {wanted}"
        raise Refused(found, where="graphs", fits="a complete file")


def _layouts(entries: Any, model: nn.Module) -> tuple[tuple[str, Layout], ...]:
    return tuple((identifier(n, "an argument"), _layout(layout, model)) for n, layout in entries)


def _layout(entry: Any, model: nn.Module) -> Layout:
    kind = entry["kind"]
    if kind not in KINDS:
        raise Refused(f"layout {kind!r}", where="graphs", fits=", ".join(KINDS))
    return Layout(
        kind,
        _type_of(entry["type"], kind, model) if "type" in entry else None,
        tuple(value_of(n, {}) for n in entry.get("names", ())),
        tuple(_layout(p, model) for p in entry.get("parts", ())),
        value_of(entry.get("value"), {}),
    )


def _type_of(name: Any, kind: str, model: nn.Module) -> type:
    """A container's type: Python's own, or one that the model's own code or transformers has loaded already."""
    if name in _BUILT_IN and kind in ("items", "mapping"):
        return _BUILT_IN[name]
    module, _, last = str(name).rpartition(".")
    known = {base.__module__ for m in model.modules() for base in type(m).__mro__} - {"builtins"}
    near = module in known or (
        module.split(".")[0] == "transformers" and "transformers" in {k.split(".")[0] for k in known}
    )
    if near or module.endswith((".compiler.ring_cache", ".compiler.state_cache")):
        found = vars(sys.modules[module]).get(last) if module in sys.modules else None
        if isinstance(found, type) and _holds(found, kind):
            return found
    raise Refused(f"type {str(name)[:80]!r}", where="graphs", fits="the model's own outputs and caches")


def _holds(made: type, kind: str) -> bool:
    """Whether a type is a container of that kind: a dataclass, a named tuple, a mapping, a cache."""
    if kind == "fields":
        return is_dataclass(made)
    if kind == "items":
        return issubclass(made, tuple | list)
    return issubclass(made, Mapping) if kind == "mapping" else is_cache(object.__new__(made))


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise Refused(f"{str(values)[:60]} is no list of texts", where="graphs", fits="a complete file")
    return tuple(values)


def _sizes(entry: Any) -> Sizes:
    symbols = {
        identifier(n, "a size"): Symbol(n, int(least), most and int(most)) for n, least, most in entry["symbols"]
    }
    shapes = tuple(tuple(_size(s, symbols) for s in shape) for shape in entry["shapes"])
    dtypes = tuple(value_of({"dtype": d}, {}) for d in entry["dtypes"])
    guards = tuple(arithmetic(_SIZE.sub("s", guard), {"s"}) and guard for guard in _texts(entry["guards"]))
    return Sizes(_texts(entry["inputs"]), shapes, dtypes, symbols, guards)


def _size(size: Any, symbols: Mapping[str, Any]) -> int | str:
    return size if type(size) is int else arithmetic(size, symbols)


def arithmetic(text: Any, names: Sequence[str] | set[str] | Mapping[str, Any]) -> str:
    """The text itself, where it is arithmetic on these names and small numbers and nothing else.

    >>> arithmetic("2*s0 + 1", {"s0"})
    '2*s0 + 1'
    """
    try:
        tree = ast.parse(text, mode="eval") if isinstance(text, str) and len(text) < 2000 else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        tree = None
    if tree is None or not all(_is_arithmetic(node, set(names)) for node in _walk(tree)):
        raise Refused(
            f"a condition on sizes {str(text)[:80]!r}", where="graphs", fits="+ - * // % and comparisons of sizes"
        )
    return str(text)


def _walk(tree: ast.AST) -> list[ast.AST]:
    """Every node that has to be judged by itself: the function of a permitted call stands for itself."""
    found, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        found.append(node)
        inside = node.args if isinstance(node, ast.Call) and ast.unparse(node.func) in _CALLS else None
        waiting += list(ast.iter_child_nodes(node)) if inside is None else inside
    return found


def _is_arithmetic(node: ast.AST, names: set[str]) -> bool:
    if isinstance(node, ast.Name):
        return node.id in names
    if isinstance(node, ast.Constant):
        return isinstance(node.value, bool | int | float) and abs(node.value) < 2**63
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in _CALLS and not node.keywords
    return isinstance(node, _ARITHMETIC)
