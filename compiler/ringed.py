"""A captured graph over a growing cache becomes one over what its layers keep: rings of keys, and states.

The model is captured with ordinary layers, in which rows are logical positions; sites are raised and rewritten there.
Then the past keys of a ring layer become its kept rows, those of a layer of one scan its state (`stated.py`), the
number of keys that ever came a new input, and every place that asked how long the past is asks that. An attention that
knows only i - j and its sinks is left as it is; any other is told where its rows stand.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from .capture import Captured
from .containers import Layout, is_cache, put_together, take_apart
from .grown import (
    LENGTH,
    Entered,
    count_from_the_start,
    enter,
    joined,
    lengthened,
    like_rows,
    put,
    without_whole_slices,
)
from .held_rows import as_numbers, numbers_like, rows_held
from .nodes import op_name
from .ports import ATTEND
from .primitives.attend_spec import AttendSpec
from .ranges import Sizes, Symbol
from .reach import Reach, kept_keys, key_positions, moves_freely, reach
from .refusal import Refused
from .signature import Call
from .stated import Carried, carry, tell

_SIZE = re.compile(r"L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\]")


def unringed(call: Call) -> Call:
    """The same call with ordinary layers in place of rings and states."""
    if not _short_layers(call):
        return call
    args = tuple(map(_unrolled, call.args))
    return Call.of(call.signature, args, {n: _unrolled(v) for n, v in call.kwargs.items()})


def ringed(captured: Captured, call: Call) -> Captured:
    """The graph for a call with rings and states, from that of the call without them."""
    layers = _short_layers(call)
    if not layers:
        return captured
    module = captured.graph
    inputs = dict(zip(captured.dims.inputs, module.graph.find_nodes(op="placeholder"), strict=True))
    stands_for = {path: _sizes_of(inputs, path) for path, layer in layers.items() if _is_state(layer)}
    entered = {path: enter(module.graph, path, inputs) for path in layers}
    output = next(iter(module.graph.find_nodes(op="output")))
    carried = [carry(entered[path]) for path in stands_for]
    kept = _carried_on(output, carried)
    for path, layer in layers.items():
        if path not in stands_for:
            kept |= _ring_kept(output, entered[path], layer.bound)
    _give_back(captured, call, output, kept)
    module.graph.eliminate_dead_code()  # the scans over all keys among it
    for one in carried:
        _read_no_more(one)
    module.graph.lint()
    module.recompile()
    given = {n: _told(layout, n, stands_for) for n, layout in call.layouts if n in _names(layers)}
    return replace(
        captured,
        key=call.key(captured.key.setting),
        layouts=call.layouts,
        grown=tuple((n, given.get(n, layout)) for n, layout in captured.grown),
        dims=_sizes(captured.dims, list(entered.values()), {one.layer.path: one for one in carried}),
    )


def as_captured(
    captured: Captured, call: Call, tensors: Sequence[Tensor]
) -> tuple[Call, tuple[Tensor, ...], tuple[frozenset[int], ...]]:
    """The call with rings and states unrolled, its tensors, open dimensions: what the model was captured with."""
    parts, bytes_of = ("keys", "values", LENGTH), rows_held(captured)
    seen = {f"{path}.{part}": layer for path, layer in _short_layers(call).items() for part in parts}
    sizes, opened, states = [], [], _stood_for(captured)
    for name, shape, tensor in zip(captured.dims.inputs, captured.dims.shapes, tensors, strict=True):
        if name in seen and name.endswith(LENGTH):
            continue
        if name in seen:
            tensor = _ordinary(seen[name].cumulative_length, tensor, states.get(name))
        if name in bytes_of:
            tensor = numbers_like(tensor, bytes_of[name])
        sizes.append(tensor)
        opened.append(frozenset(d for d, size in enumerate(shape) if isinstance(size, str)))
    return unringed(as_numbers(call)), tuple(sizes), tuple(opened)


# --- the call ---------------------------------------------------------------------------------------------------------


def _short_layers(call: Call) -> dict[str, Any]:
    """Layers of a call's caches that keep less than all keys, by path: past_key_values.layers.3."""
    caches = {n: v for n, v in call.values.items() if is_cache(v)}
    layers = {f"{n}.layers.{k}": layer for n, v in caches.items() for k, layer in enumerate(getattr(v, "layers", ()))}
    return {path: layer for path, layer in layers.items() if _is_short(layer)}


def _is_short(layer: Any) -> bool:
    return getattr(layer, "is_ring", False) or _is_state(layer)


def _is_state(layer: Any) -> bool:
    return getattr(layer, "is_state", False)


def _names(layers: Mapping[str, Any]) -> set[str]:
    return {path.split(".")[0] for path in layers}


def _unrolled(value: Any) -> Any:
    if not is_cache(value):
        return value
    twin = copy.copy(value)
    twin.layers = [layer.unrolled() if _is_short(layer) else layer for layer in value.layers]
    return twin


def _ordinary(length: int, held: Tensor, state: tuple[int, int, str] | None) -> Tensor:
    """Zeros of the size that keys or values would have in a layer that keeps them all."""
    if state is None:
        return held.new_zeros((*held.shape[:2], length, *held.shape[3:]))
    return like_rows(held, length, state)


def _sizes_of(inputs: Mapping[str, fx.Node], path: str) -> tuple[Any, ...]:
    """The heads, dimension and type of the keys and values that a state stands for."""
    keys, values = (inputs[f"{path}.{part}"].meta["val"] for part in ("keys", "values"))
    return tuple((int(t.shape[1]), int(t.shape[3]), str(t.dtype).removeprefix("torch.")) for t in (keys, values))


def _told(layout: Layout, path: str, stands_for: Mapping[str, tuple[Any, ...]]) -> Layout:
    """The layout of a cache that comes out, its states told what they stand for."""
    if not layout.parts:
        return layout
    names = layout.names or tuple(range(len(layout.parts)))
    parts = tuple(_told(part, f"{path}.{n}", stands_for) for n, part in zip(names, layout.parts, strict=True))
    if path not in stands_for:
        return replace(layout, parts=parts)
    own = take_apart(stands_for[path], "")[1]
    return replace(layout, names=(*layout.names, "stands_for"), parts=(*parts, own))


def _stood_for(captured: Captured) -> dict[str, tuple[int, int, str]]:
    """What the cache inputs that are states stand for, by path."""
    found: dict[str, tuple[int, int, str]] = {}

    def read(layout: Layout, path: str) -> None:
        for name, part in zip(layout.names or tuple(range(len(layout.parts))), layout.parts, strict=True):
            if name == "stands_for":
                keys, values = put_together(part, ())
                found.update({f"{path}.keys": keys, f"{path}.values": values})
            else:
                read(part, f"{path}.{name}")

    for name, layout in captured.grown:
        read(layout, name)
    return found


# --- the graph --------------------------------------------------------------------------------------------------------


def _carried_on(output: fx.Node, carried: Sequence[Carried]) -> dict[str, tuple[fx.Node, fx.Node]]:
    """By input path: the node that the cache gave back in its place, and what it gives back now."""
    told = tell(output, carried)
    found: dict[str, tuple[fx.Node, fx.Node]] = {}
    for one in carried:
        path, (keys, values) = one.layer.path, one.cats
        for cat in one.cats:
            count_from_the_start(one.layer, cat)
        found |= {
            f"{path}.keys": (keys, one.after),
            f"{path}.values": (values, told[path]),
            f"{path}.{LENGTH}": (keys, lengthened(output, one.layer, keys)),
        }
    return found


def _read_no_more(carried: Carried) -> None:
    others = [u for cat in carried.cats for u in cat.users]
    if others:
        found = f"the joined keys are also read by {op_name(others[0]) or others[0].op} (%{others[0].name})"
        raise Refused(found, where=carried.layer.path, fits="one scan; DynamicCache() for this model")


def _ring_kept(output: fx.Node, ring: Entered, bound: Reach) -> dict[str, tuple[fx.Node, fx.Node]]:
    """The same of a ring."""
    cats = {path: joined(ring, past) for path, past in ring.states.items()}
    for cat in cats.values():
        count_from_the_start(ring, cat)
    _attend_by_position(ring, bound, *cats.values())
    keys = cats[f"{ring.path}.keys"]
    found = {path: (cat, _cut(output, bound, cat)) for path, cat in cats.items()}
    return found | {f"{ring.path}.{LENGTH}": (keys, lengthened(output, ring, keys))}


def _attend_by_position(ring: Entered, bound: Reach, keys: fx.Node, values: fx.Node) -> None:
    for node in (keys, values):
        without_whole_slices(node)
    read = [_numbers(node) for node in (keys, values)]
    for user in list(dict.fromkeys(user for node in (keys, values, *read) for user in node.users)):
        if user.op == "output" or op_name(user) in ("sym_size", "unpack_rows") or user in read:
            continue
        if user.target is not ATTEND or list(user.args[1])[:2] != read:  # type: ignore[arg-type]
            found = f"the kept keys are read by {op_name(user)} (%{user.name})"
            raise Refused(found, where=ring.path, fits="one attend; DynamicCache() for this model")
        text = str(user.args[3])
        _fits(ring, bound, text)
        if not moves_freely(text):
            _tell_positions(ring, bound, user, keys)


def _numbers(rows: fx.Node) -> fx.Node:
    """What rows of bytes are read as."""
    unpacked = next((u for u in rows.users if op_name(u) == "unpack_rows"), None)
    return rows if unpacked is None else next(iter(unpacked.users))


def _fits(ring: Entered, bound: Reach, text: str) -> None:
    spec = AttendSpec.of(text)
    if not reach(text).within(bound):
        found = f"the call keeps {spec.keep or 'everything'}, the ring {bound}"
        raise Refused(found, where=ring.path, fits="DynamicCache() for this call")
    placed = (spec.align == "start", spec.q_positions, spec.k_positions, any(spec.rows), spec.tiles, spec.leader)
    if any(placed) or re.search(r"\b[NM]\b", replace(spec, empty="").text):
        found = f"an attention that counts rows: {text}"
        raise Refused(found, where=ring.path, fits="positions that are counted from the end of the keys")


def _tell_positions(ring: Entered, bound: Reach, attend: fx.Node, keys: fx.Node) -> None:
    q, tables = attend.args[0], list(attend.args[2])  # type: ignore[arg-type]
    assert isinstance(q, fx.Node)

    def places(k: Tensor, q: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        seen, new = length.shape[0], q.shape[2]
        queries = torch.arange(new, device=k.device) + seen
        return queries, key_positions(k.shape[2], seen, new, bound, k.device)

    queries, stand = put(attend, places, {"k": keys, "q": q, "length": ring.length}, like=attend)
    spec = replace(
        AttendSpec.of(str(attend.args[3])),
        align="start",
        empty="",  # it asks for keys that are gone
        q_positions=f"t{len(tables)}",
        k_positions=f"t{len(tables) + 1}",
    )
    attend.args = (q, attend.args[1], [*tables, queries, stand], spec.text)


def _give_back(captured: Captured, call: Call, output: fx.Node, kept: Mapping[str, tuple[fx.Node, fx.Node]]) -> None:
    """What the caches become: rings cut, states carried on, ordinary layers as they were, and the new lengths."""
    results: Any = output.args[0]
    flat: list[Any] = list(results)
    start = captured.output.count
    after = start + sum(layout.count for _, layout in captured.grown)
    given = iter(flat[start:after])
    rows: list[Any] = []
    for name, _ in captured.grown:
        for leaf in (leaf for leaf in call.leaves if leaf.path.split(".")[0] == name):
            joint, now = kept.get(leaf.path, (None, None))
            if now is None or not leaf.path.endswith(LENGTH):
                node = next(given)
                if now is not None and node is not joint:
                    raise Refused("the cache does not keep what is attended", where=leaf.path, fits="DynamicCache()")
                now = node if now is None else now
            rows.append(now)
    output.args = ((*flat[:start], *rows, *flat[after:]),)


def _cut(output: fx.Node, bound: Reach, cat: fx.Node) -> fx.Node:
    def cut(k: Tensor) -> Tensor:
        rows = kept_keys(k.shape[2], bound, k.device)
        assert rows is not None  # a ring has a bound
        return k.index_select(2, rows)

    return put(output, cut, {"k": cat}, like=cat)[0]


# --- the sizes --------------------------------------------------------------------------------------------------------


def _sizes(dims: Sizes, layers: Sequence[Entered], states: Mapping[str, Carried]) -> Sizes:
    """The logical length takes the past's symbol; a ring's rows are its own affair, a state has its size."""
    paths = {layer.path for layer in layers}
    told: list[tuple[str, tuple[int | str, ...], torch.dtype]] = []
    symbols = dict(dims.symbols)
    moved: dict[tuple[int, int], tuple[int, int]] = {}
    for index, (name, shape, dtype) in enumerate(zip(dims.inputs, dims.shapes, dims.dtypes, strict=True)):
        layer, _, last = name.rpartition(".")
        moved |= {(index, d): (len(told), d) for d in range(len(shape))}
        if layer not in paths or last not in ("keys", "values"):
            told.append((name, shape, dtype))
            continue
        if isinstance(shape[2], int):
            raise Refused(f"captured with a past of {shape[2]}", where=name, fits="a past whose length is dynamic")
        moved[index, 2] = (len(told) + (2 if last == "keys" else 1), 0)  # where the length stands, behind the values
        if layer in states:
            told.append((name, *_of_a_state(states[layer], shape[0], last)))
        else:
            held = f"held_{layer.replace('.', '_')}"
            symbols[held] = Symbol(held)
            told.append((name, (*shape[:2], held, *shape[3:]), dtype))
        if last == "values":
            told.append((f"{layer}.{LENGTH}", (shape[2], 0), torch.get_default_dtype()))
    inputs, shapes, dtypes = zip(*told, strict=True) if told else ((), (), ())
    return Sizes(inputs, shapes, dtypes, symbols, tuple(_moved(guard, moved) for guard in dims.guards))


def _of_a_state(state: Carried, batch: int | str, last: str) -> tuple[tuple[int | str, ...], torch.dtype]:
    """A state stands where the keys stood, in the place of the values what it was told of padding."""
    return ((batch, *state.sizes), state.dtype) if last == "keys" else ((batch, 2), torch.long)


def _moved(guard: str, moved: Mapping[tuple[int, int], tuple[int, int]]) -> str:
    """A guard that speaks of the inputs where they stand now."""

    def there(match: re.Match[str]) -> str:
        tensor, dim = moved[int(match[1]), int(match[2])]
        return f"L['tensors'][{tensor}].size()[{dim}]"

    return _SIZE.sub(there, guard)
