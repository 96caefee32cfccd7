"""What a cache holds of stored keys and values: rows of bytes in place of numbers, moved by the same operations.

A model is captured over an ordinary cache and rewritten, every reader of k and v reading them as they come back from
storage. Row by row that commutes with joining, cutting and picking, so the bytes move up the graph: new rows are packed
before they join the past, the past and the result are bytes, and what is attended is unpacked behind the joining.
`rows` of such a cache layer is the spec of its keys and of its values.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from .capture import Captured
from .containers import Layout, is_cache
from .nodes import args_of, op_name
from .primitives.packed_rows import RowSpec, pack_op, stored_op, unpack_op
from .refusal import Refused
from .signature import Call

STATES = ("keys", "values")
_MOVES = frozenset({"slice", "index_select", "detach", "alias", "clone", "contiguous"})  # rows, and nothing in them


def as_numbers(call: Call) -> Call:
    """The same call with caches of numbers in place of bytes: what the model is captured with."""
    if not any(getattr(layer, "rows", None) for v in call.values.values() for layer in _layers(v)):
        return call
    args = tuple(map(_wide, call.args))
    return Call.of(call.signature, args, {n: _wide(v) for n, v in call.kwargs.items()})


def as_bytes(captured: Captured, call: Call) -> Captured:
    """The graph whose caches hold bytes wherever what they hold is stored; the captured one where nothing is."""
    if not captured.graph.graph.find_nodes(op="call_function", target=stored_op.op):
        return captured
    graph = captured.graph.graph
    inputs = dict(zip(captured.dims.inputs, graph.find_nodes(op="placeholder"), strict=True))
    output = next(iter(graph.find_nodes(op="output")))
    flat: list[Any] = list(output.args[0])
    held: dict[str, RowSpec] = {}
    for place, path in enumerate(_paths(captured)):
        node = flat[place]
        if path.rpartition(".")[2] in STATES and isinstance(node, fx.Node):
            joined = _joined(node)
            spec = _spec_of(joined)
            if spec is not None:
                held[path] = spec
                flat[place] = _packed(joined, node, inputs.get(path), path)
    output.args = (tuple(flat),)
    graph.eliminate_dead_code()
    graph.lint()
    captured.graph.recompile()
    return replace(
        captured,
        key=call.key(captured.key.setting),
        layouts=call.layouts,
        output=_marked(captured.output, "", held),
        grown=tuple((name, _marked(layout, name, held)) for name, layout in captured.grown),
        dims=_sizes(captured, held),
    )


def rows_held(captured: Captured) -> dict[str, RowSpec]:
    """The specs of the cache inputs that hold bytes, by path."""
    found: dict[str, RowSpec] = {}
    for name, layout in captured.grown:
        _read(layout, name, found)
    return found


def numbers_like(rows: Tensor, spec: RowSpec) -> Tensor:
    """Zeros of the sizes and type that rows of bytes stand for."""
    return rows.new_zeros((*rows.shape[:-1], spec.dim), dtype=getattr(torch, spec.dtype))


# --- the call ---------------------------------------------------------------------------------------------------------


def _layers(value: Any) -> Sequence[Any]:
    return tuple(getattr(value, "layers", ())) if is_cache(value) else ()


def _wide(value: Any) -> Any:
    if not is_cache(value):
        return value
    twin = copy.copy(value)
    twin.layers = [_wide_layer(layer) if getattr(layer, "rows", None) else layer for layer in value.layers]
    return twin


def _wide_layer(layer: Any) -> Any:
    twin = copy.copy(layer)
    twin.rows = None
    for name, text in zip(STATES, layer.rows):
        rows = getattr(layer, name)
        if text and isinstance(rows, Tensor) and rows.dtype == torch.uint8:
            setattr(twin, name, numbers_like(rows, RowSpec.of(text)))
    twin.dtype = twin.keys.dtype
    return twin


# --- the graph --------------------------------------------------------------------------------------------------------


def _paths(captured: Captured) -> list[str]:
    """The paths of a graph's outputs, in order; behind those of the answer what the arguments have become."""
    found = _leaf_paths(captured.output, "")
    for name, layout in captured.grown:
        found += _leaf_paths(layout, name)
    return found


def _leaf_paths(layout: Layout, path: str) -> list[str]:
    if layout.kind == "tensor":
        return [path]
    names = layout.names or tuple(range(len(layout.parts)))
    return [leaf for n, part in zip(names, layout.parts) for leaf in _leaf_paths(part, _below(path, n))]


def _below(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)


def _joined(node: fx.Node) -> fx.Node:
    """Where past and new rows were joined, in front of what only moves rows."""
    while op_name(node) in _MOVES and _reader(node) is None:
        node = args_of(node)[0]
    return node


def _reader(node: fx.Node) -> fx.Node | None:
    """The node that stores these rows, behind slices that take everything."""
    for user in node.users:
        if user.target is stored_op.op:
            return user
        if op_name(user) in _MOVES and (found := _reader(user)) is not None:
            return found
    return None


def _spec_of(node: fx.Node) -> RowSpec | None:
    reader = _reader(node)
    return None if reader is None else RowSpec.of(str(reader.args[1]))


def _packed(joined: fx.Node, kept: fx.Node, past: fx.Node | None, path: str) -> fx.Node:
    """What the cache keeps, as bytes; where it had a past, that is bytes too, and what is attended is unpacked."""
    reader = _reader(joined)
    assert reader is not None
    text = str(reader.args[1])
    if past is None:  # the cache is made by this call: what is attended stays as it is, and keeps its gradient
        return _moved(kept, joined, _pack(joined, joined, text))
    if past not in joined.all_input_nodes or op_name(joined) != "cat" or len(args_of(joined)[0]) != 2:
        raise Refused(f"the past is read by {op_name(joined)}", where=path, fits="a cache that grows: cat(past, new)")
    graph, spec = joined.graph, RowSpec.of(text)
    old: Tensor = past.meta["val"]
    past.meta["val"] = old.new_empty((*old.shape[:-1], spec.bytes), dtype=torch.uint8)
    new: Any = args_of(joined)[0][1]
    row = _pack(joined, new, text)
    with graph.inserting_before(joined):
        rows = graph.call_function(joined.target, ([past, row], 2))  # type: ignore[arg-type]
    whole: Tensor = joined.meta["val"]
    rows.meta = dict(joined.meta) | {"val": whole.new_empty((*whole.shape[:-1], spec.bytes), dtype=torch.uint8)}
    _unpack_readers(joined, rows, text, path)
    bytes_kept = _moved(kept, joined, rows)
    for user in [u for u in joined.users if op_name(u) == "sym_size"]:
        user.replace_input_with(joined, rows)
    return bytes_kept


def _pack(before: fx.Node, rows: fx.Node, text: str) -> fx.Node:
    graph, value = rows.graph, rows.meta["val"]
    at = before if before is not rows else rows.next
    with graph.inserting_before(at):
        call = graph.call_function(pack_op.op, (rows, text))
        found = graph.call_function(operator.getitem, (call, 0))
    packed = value.new_empty((*value.shape[:-1], RowSpec.of(text).bytes), dtype=torch.uint8)
    call.meta, found.meta = {"val": [packed]}, {"val": packed}
    return found


def _unpack_readers(joined: fx.Node, rows: fx.Node, text: str, path: str) -> None:
    """Whoever stores the joined rows reads the bytes instead; nobody may read them as they came."""
    graph = joined.graph
    for user in list(joined.users):
        if op_name(user) in _MOVES:
            moved = _moved_one(user, rows)
            _unpack_readers(user, moved, text, path)
            if not moved.users:
                graph.erase_node(moved)
        elif user.target is stored_op.op:
            if str(user.args[1]) != text:
                raise Refused(f"stored as {text} and as {user.args[1]}", where=path, fits="one mechanism for a cache")
            with graph.inserting_before(user):
                call = graph.call_function(unpack_op.op, (rows, text))
            call.meta = dict(user.meta)
            user.replace_all_uses_with(call)
            graph.erase_node(user)
        elif user.op != "output" and op_name(user) != "sym_size":
            found = f"its rows are also read by {op_name(user)} (%{user.name}) as they came"
            raise Refused(found, where=path, fits="a mechanism that reads the ports k and v, or `kv: keep`")


def _moved(kept: fx.Node, joined: fx.Node, rows: fx.Node) -> fx.Node:
    """The same moves of rows of bytes."""
    if kept is joined:
        return rows
    return _moved_one(kept, _moved(args_of(kept)[0], joined, rows))


def _moved_one(move: fx.Node, rows: fx.Node) -> fx.Node:
    dim = move.args[1] if op_name(move) in ("slice", "index_select") and len(move.args) > 1 else 0
    if dim in (3, -1):
        raise Refused(f"a {op_name(move)} of channels", where=move.name, fits="a cache that keeps whole rows")
    with move.graph.inserting_after(move):
        moved = move.graph.call_function(move.target, (rows, *args_of(move)[1:]), move.kwargs)  # type: ignore[arg-type]
    value, packed = move.meta["val"], rows.meta["val"]
    moved.meta = dict(move.meta) | {"val": value.new_empty((*value.shape[:-1], packed.shape[-1]), dtype=torch.uint8)}
    return moved


# --- what a call is made of -------------------------------------------------------------------------------------------


def _marked(layout: Layout, path: str, held: Mapping[str, RowSpec]) -> Layout:
    """The layout of what comes out, cache layers told what their bytes are."""
    if layout.kind == "tensor" or not layout.parts:
        return layout
    names = layout.names or tuple(range(len(layout.parts)))
    parts = tuple(_marked(part, _below(path, n), held) for n, part in zip(names, layout.parts))
    specs = [held.get(_below(path, state)) for state in STATES]
    if layout.kind != "object" or not any(specs):
        return replace(layout, parts=parts)
    texts = Layout("items", tuple, parts=tuple(Layout("value", value=spec.text if spec else "") for spec in specs))
    return replace(layout, names=(*layout.names, "rows"), parts=(*parts, texts))


def _read(layout: Layout, path: str, found: dict[str, RowSpec]) -> None:
    for name, part in zip(layout.names or tuple(range(len(layout.parts))), layout.parts):
        if name == "rows" and layout.kind == "object":
            texts = [one.value for one in part.parts]
            found |= {_below(path, s): RowSpec.of(text) for s, text in zip(STATES, texts) if text}
        else:
            _read(part, _below(path, name), found)


def _sizes(captured: Captured, held: Mapping[str, RowSpec]) -> Any:
    dims = captured.dims
    specs = [held.get(name) for name in dims.inputs]
    shapes = tuple((*shape[:-1], spec.bytes) if spec else shape for shape, spec in zip(dims.shapes, specs))
    dtypes = tuple(torch.uint8 if spec else dtype for dtype, spec in zip(dims.dtypes, specs))
    return replace(dims, shapes=shapes, dtypes=dtypes)
