"""A captured graph over a growing cache becomes one over rings: what no later token reaches leaves with the outputs.

The model is captured with ordinary layers, in which rows are logical positions; sites are raised and rewritten there.
Then the past keys of a ring layer become its kept rows, the number of keys that ever came a new input, and every place
that asked how long the past is asks that. An attention that knows only i - j and its sinks is left as it is; any other
is told where its rows stand.
"""

from __future__ import annotations

import copy
import operator
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from .capture import Captured
from .containers import is_cache
from .held_rows import as_numbers, numbers_like, rows_held
from .nodes import op_name
from .ports import ATTEND
from .primitives.attend_spec import AttendSpec
from .program import insert_before
from .ranges import Sizes, Symbol
from .reach import Reach, kept_keys, key_positions, moves_freely, reach
from .refusal import Refused
from .signature import Call
from .tracing import trace_function

LENGTH = "cumulative_length"
_SIZE = re.compile(r"L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\]")
_EXAMPLES = {"k": (2, 2, 13, 8), "q": (2, 2, 3, 8), "length": (11, 0)}  # unlike sizes: none is taken for another


@dataclass(frozen=True)
class Ring:
    """One ring layer in the graph: what it keeps, its inputs."""

    path: str
    bound: Reach
    keys: fx.Node
    values: fx.Node
    length: fx.Node
    seen: fx.Node  # how many keys came before this call

    @property
    def states(self) -> Mapping[str, fx.Node]:
        return {f"{self.path}.keys": self.keys, f"{self.path}.values": self.values}


def unringed(call: Call) -> Call:
    """The same call with ordinary layers in place of rings."""
    if not _ring_layers(call):
        return call
    args = tuple(map(_unrolled, call.args))
    return Call.of(call.signature, args, {n: _unrolled(v) for n, v in call.kwargs.items()})


def ringed(captured: Captured, call: Call) -> Captured:
    """The graph for a call with rings, from that of the call without them."""
    layers = _ring_layers(call)
    if not layers:
        return captured
    module = captured.graph
    inputs = dict(zip(captured.dims.inputs, module.graph.find_nodes(op="placeholder"), strict=True))
    rings = [_enter(module.graph, path, layer.bound, inputs) for path, layer in layers.items()]
    grown: dict[str, tuple[Ring, fx.Node]] = {}
    for ring in rings:
        cats = {path: _grown(ring, past) for path, past in ring.states.items()}
        _attend_by_position(ring, *cats.values())
        grown |= {path: (ring, cat) for path, cat in cats.items()}
    _cut_outputs(captured, call, grown)
    module.graph.lint()
    module.recompile()
    after = tuple((n, dict(call.layouts)[n] if n in _names(layers) else layout) for n, layout in captured.grown)
    return replace(
        captured,
        key=call.key(captured.key.setting),
        layouts=call.layouts,
        grown=after,
        dims=_sizes(captured.dims, rings),
    )


def as_captured(
    captured: Captured, call: Call, tensors: Sequence[Tensor]
) -> tuple[Call, tuple[Tensor, ...], tuple[frozenset[int], ...]]:
    """The call with rings unrolled, its tensors and open dimensions: what the model itself was captured with."""
    parts, bytes_of = ("keys", "values", LENGTH), rows_held(captured)
    seen = {f"{path}.{part}": layer for path, layer in _ring_layers(call).items() for part in parts}
    sizes, opened = [], []
    for name, shape, tensor in zip(captured.dims.inputs, captured.dims.shapes, tensors, strict=True):
        if name in seen and name.endswith(LENGTH):
            continue
        if name in seen:
            tensor = tensor.new_zeros((*tensor.shape[:2], seen[name].cumulative_length, *tensor.shape[3:]))
        if name in bytes_of:
            tensor = numbers_like(tensor, bytes_of[name])
        sizes.append(tensor)
        opened.append(frozenset(d for d, size in enumerate(shape) if isinstance(size, str)))
    return unringed(as_numbers(call)), tuple(sizes), tuple(opened)


# --- the call ---------------------------------------------------------------------------------------------------------


def _ring_layers(call: Call) -> dict[str, Any]:
    """Ring layers of a call's caches by path: past_key_values.layers.3."""
    caches = {n: v for n, v in call.values.items() if is_cache(v)}
    layers = {f"{n}.layers.{k}": layer for n, v in caches.items() for k, layer in enumerate(getattr(v, "layers", ()))}
    return {path: layer for path, layer in layers.items() if getattr(layer, "is_ring", False)}


def _names(layers: Mapping[str, Any]) -> set[str]:
    return {path.split(".")[0] for path in layers}


def _unrolled(value: Any) -> Any:
    if not is_cache(value):
        return value
    twin = copy.copy(value)
    twin.layers = [layer.unrolled() if getattr(layer, "is_ring", False) else layer for layer in value.layers]
    return twin


# --- the graph --------------------------------------------------------------------------------------------------------


def _enter(graph: fx.Graph, path: str, bound: Reach, inputs: Mapping[str, fx.Node]) -> Ring:
    keys, values = inputs[f"{path}.keys"], inputs[f"{path}.values"]
    with graph.inserting_after(values):
        length = graph.placeholder(f"{path}.{LENGTH}".replace(".", "_"))
    length.meta["val"] = torch.empty(_EXAMPLES["length"])
    last = list(graph.find_nodes(op="placeholder"))[-1]
    with graph.inserting_after(last):
        seen = graph.call_function(torch.ops.aten.sym_size.int, (length, 0))
    for past in (keys, values):
        for user in [u for u in past.users if op_name(u) == "sym_size" and u.args[1] in (2, -2)]:
            user.replace_all_uses_with(seen)
            graph.erase_node(user)
    return Ring(path, bound, keys, values, length, seen)


def _grown(ring: Ring, past: fx.Node) -> fx.Node:
    """The node that puts new rows behind the past ones, its length made logical wherever it is asked for."""
    users = [u for u in past.users if op_name(u) != "sym_size"]
    if len(users) != 1 or op_name(users[0]) != "cat" or list(users[0].args[0])[:1] != [past]:  # type: ignore[arg-type]
        found = f"the past is read by {', '.join(op_name(u) for u in users) or 'nothing'}"
        raise Refused(found, where=ring.path, fits="a cache that only grows: cat(past, new)")
    cat = users[0]
    for user in [u for u in cat.users if op_name(u) == "sym_size" and u.args[1] in (2, -2)]:
        with cat.graph.inserting_before(user):
            new = cat.graph.call_function(torch.ops.aten.sym_size.int, (cat.args[0][1], 2))  # type: ignore[index]
            total = cat.graph.call_function(operator.add, (ring.seen, new))
        user.replace_all_uses_with(total)
        cat.graph.erase_node(user)
    return cat


def _attend_by_position(ring: Ring, keys: fx.Node, values: fx.Node) -> None:
    for node in (keys, values):
        _without_whole_slices(node)
    read = [_numbers(node) for node in (keys, values)]
    for user in list(dict.fromkeys(user for node in (keys, values, *read) for user in node.users)):
        if user.op == "output" or op_name(user) in ("sym_size", "unpack_rows") or user in read:
            continue
        if user.target is not ATTEND or list(user.args[1])[:2] != read:  # type: ignore[arg-type]
            found = f"the kept keys are read by {op_name(user)} (%{user.name})"
            raise Refused(found, where=ring.path, fits="one attend; DynamicCache() for this model")
        text = str(user.args[3])
        _fits(ring, text)
        if not moves_freely(text):
            _tell_positions(ring, user, keys)


def _numbers(rows: fx.Node) -> fx.Node:
    """What rows of bytes are read as."""
    unpacked = next((u for u in rows.users if op_name(u) == "unpack_rows"), None)
    return rows if unpacked is None else next(iter(unpacked.users))


def _without_whole_slices(node: fx.Node) -> None:
    """Slices that take everything, k[:, :], are their operand."""
    for user in list(node.users):
        if op_name(user) == "slice" and user.args[0] is node and _takes_all(user):
            _without_whole_slices(user)
            user.replace_all_uses_with(node)
            node.graph.erase_node(user)


def _takes_all(node: fx.Node) -> bool:
    given: list[Any] = list(node.args[2:])
    start, end, step = given + [None, sys.maxsize, 1][len(given) :]
    return bool((start or 0, end, step) == (0, sys.maxsize, 1))


def _fits(ring: Ring, text: str) -> None:
    spec = AttendSpec.of(text)
    if not reach(text).within(ring.bound):
        found = f"the call keeps {spec.keep or 'everything'}, the ring {ring.bound}"
        raise Refused(found, where=ring.path, fits="DynamicCache() for this call")
    placed = (spec.align == "start", spec.q_positions, spec.k_positions, any(spec.rows), spec.tiles, spec.leader)
    if any(placed) or re.search(r"\b[NM]\b", replace(spec, empty="").text):
        found = f"an attention that counts rows: {text}"
        raise Refused(found, where=ring.path, fits="positions that are counted from the end of the keys")


def _tell_positions(ring: Ring, attend: fx.Node, keys: fx.Node) -> None:
    q, tables = attend.args[0], list(attend.args[2])  # type: ignore[arg-type]
    assert isinstance(q, fx.Node)

    def places(k: Tensor, q: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        seen, new = length.shape[0], q.shape[2]
        queries = torch.arange(new, device=k.device) + seen
        return queries, key_positions(k.shape[2], seen, new, ring.bound, k.device)

    queries, stand = _put(attend, places, {"k": keys, "q": q, "length": ring.length}, like=attend)
    spec = replace(
        AttendSpec.of(str(attend.args[3])),
        align="start",
        empty="",  # it asks for keys that are gone
        q_positions=f"t{len(tables)}",
        k_positions=f"t{len(tables) + 1}",
    )
    attend.args = (q, attend.args[1], [*tables, queries, stand], spec.text)


def _cut_outputs(captured: Captured, call: Call, grown: Mapping[str, tuple[Ring, fx.Node]]) -> None:
    """What the caches become: rings cut, ordinary layers as they were, and the new lengths."""
    graph = captured.graph.graph
    output = next(iter(graph.find_nodes(op="output")))
    results: Any = output.args[0]
    flat: list[Any] = list(results)
    start = captured.output.count
    after = start + sum(layout.count for _, layout in captured.grown)
    given = iter(flat[start:after])
    rows: list[Any] = []
    for name, _ in captured.grown:
        for leaf in (leaf for leaf in call.leaves if leaf.path.split(".")[0] == name):
            layer, _, last = leaf.path.rpartition(".")
            if last == LENGTH and f"{layer}.keys" in grown:
                rows.append(_lengthened(output, *grown[f"{layer}.keys"]))
                continue
            node = next(given)
            if leaf.path in grown and node is not grown[leaf.path][1]:
                raise Refused("the cache does not keep what is attended", where=leaf.path, fits="DynamicCache()")
            rows.append(_cut(output, *grown[leaf.path]) if leaf.path in grown else node)
    output.args = ((*flat[:start], *rows, *flat[after:]),)


def _cut(output: fx.Node, ring: Ring, cat: fx.Node) -> fx.Node:
    def cut(k: Tensor) -> Tensor:
        rows = kept_keys(k.shape[2], ring.bound, k.device)
        assert rows is not None  # a ring has a bound
        return k.index_select(2, rows)

    return _put(output, cut, {"k": cat}, like=cat)[0]


def _lengthened(output: fx.Node, ring: Ring, cat: fx.Node) -> fx.Node:
    new: fx.Node = cat.args[0][1]  # type: ignore[index,assignment]
    return _put(
        output,
        lambda length, q: length.new_zeros(length.shape[0] + q.shape[2], 0),
        {"length": ring.length, "q": new},
        like=cat,
    )[0]


def _put(
    before: fx.Node, function: Callable[..., Any], inputs: Mapping[str, fx.Node], *, like: fx.Node
) -> tuple[fx.Node, ...]:
    """The nodes of a function of k, q, length in front of a node; traced on sizes of its own."""
    device = next((n.meta["val"].device for n in inputs.values() if "val" in n.meta), None)
    fragment = trace_function(lambda *t: function(**dict(zip(inputs, t, strict=True))),
                              {n: torch.zeros(_EXAMPLES[n], device=device) for n in inputs})  # fmt: skip
    return insert_before(before, fragment, inputs, like=like)[0]


# --- the sizes --------------------------------------------------------------------------------------------------------


def _sizes(dims: Sizes, rings: list[Ring]) -> Sizes:
    """The logical length takes the past's symbol; how many rows a ring holds is its own affair."""
    paths = {ring.path for ring in rings}
    inputs: list[str] = []
    shapes: list[tuple[int | str, ...]] = []
    dtypes: list[torch.dtype] = []
    symbols = dict(dims.symbols)
    moved: dict[tuple[int, int], tuple[int, int]] = {}
    for index, (name, shape, dtype) in enumerate(zip(dims.inputs, dims.shapes, dims.dtypes, strict=True)):
        layer, _, last = name.rpartition(".")
        own = layer in paths and last in ("keys", "values")
        moved |= {(index, d): (len(inputs), d) for d in range(len(shape))}
        if own:
            if isinstance(shape[2], int):
                raise Refused(f"captured with a past of {shape[2]}", where=name, fits="a past whose length is dynamic")
            held = f"held_{layer.replace('.', '_')}"
            symbols[held] = Symbol(held)
            moved[index, 2] = (len(inputs) + (2 if last == "keys" else 1), 0)
            shapes.append((*shape[:2], held, *shape[3:]))
        else:
            shapes.append(shape)
        inputs.append(name)
        dtypes.append(dtype)
        if own and last == "values":
            inputs.append(f"{layer}.{LENGTH}")
            shapes.append((shape[2], 0))
            dtypes.append(torch.get_default_dtype())

    def there(match: re.Match[str]) -> str:
        tensor, dim = moved[int(match[1]), int(match[2])]
        return f"L['tensors'][{tensor}].size()[{dim}]"

    guards = tuple(_SIZE.sub(there, guard) for guard in dims.guards)
    return Sizes(tuple(inputs), tuple(shapes), tuple(dtypes), symbols, guards)
