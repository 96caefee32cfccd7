"""Graph edits for whole-model passes: functions put between nodes, shapes carried on after a length changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .nodes import args_of, op_name
from .ports import RESHAPING
from .program import Program, insert_before
from .refusal import Refused
from .tracing import trace_function


def insert(
    before: fx.Node, function: Callable[..., Any], inputs: Mapping[str, fx.Node], *, like: fx.Node
) -> tuple[fx.Node, ...]:
    """The nodes of function(**inputs), put in front of `before`."""
    names = tuple(inputs)

    def run(*tensors: Tensor) -> Any:
        return function(**dict(zip(names, tensors, strict=True)))

    fragment = trace_function(run, {name: node.meta["val"] for name, node in inputs.items()})
    results, _ = insert_before(before, fragment, inputs, like=like)
    return results


def residual_add(program: Program, path: str) -> fx.Node:
    """The node that adds a site's projected output to the residual stream."""
    return residual_sum(program, path)[1]


def residual_sum(program: Program, path: str) -> tuple[fx.Node, fx.Node]:
    """The residual stream in front of a site's block, and the node that adds the site's projected output to it."""
    ports = program.ports[path]
    node = ports.projected
    seen = 0
    while node is not None and seen < 16:
        users = [u for u in node.users if op_name(u) != "sym_size"]
        adds = [u for u in users if op_name(u) == "add" and all(isinstance(a, fx.Node) for a in u.args[:2])]
        if adds:
            stream = next((a for a in adds[0].args[:2] if a is not node), node)
            return stream, adds[0]  # type: ignore[return-value]
        through = [u for u in users if op_name(u) in RESHAPING | _ON_THE_WAY]
        node, seen = (through[0] if through else None), seen + 1
    raise Refused("no residual addition after the output projection", where=path, fits="a block x + W_o(attention(x))")


def block_end(stream: fx.Node) -> fx.Node:
    """The residual addition that closes the block in which `stream` is the value behind the attention."""
    for node in (stream, *(u for u in stream.users if op_name(u) in ("layer_norm", "rms_norm"))):
        adds = [u for u in node.users if op_name(u) == "add" and all(isinstance(a, fx.Node) for a in u.args[:2])]
        if adds:
            return adds[-1]
    raise Refused("no residual addition closes the last block", where="unmerge", fits="a block x + MLP(x)")


def carry_lengths(program: Program, start: fx.Node, old: int, new: int) -> None:
    """Everything after `start` is propagated again with `new` tokens where literal shapes said `old`."""
    nodes = list(program.graph.graph.nodes)
    changed = {start}
    for node in nodes[nodes.index(start) + 1 :]:
        if node.op not in ("call_function", "call_module") or not changed & set(node.all_input_nodes):
            continue
        if op_name(node) in _SHAPED:
            _relabel(node, old, new)
        before = _shapes(node.meta.get("val"))
        try:
            node.meta["val"] = _propagate(program, node)
        except (RuntimeError, ValueError, TypeError) as error:
            first = str(error).splitlines()[0]
            found = f"%{node.name} = {op_name(node)} does not go with {new} tokens instead of {old}: {first}"
            raise Refused(found, where="lengths", fits="a model that treats tokens alike, or unmerge: true") from None
        if _shapes(node.meta["val"]) != before:
            changed.add(node)


_ON_THE_WAY = frozenset({"dropout", "mul", "div", "layer_norm", "rms_norm", "roll"})  # from a projection to its sum
_SHAPED = frozenset({"view", "reshape", "_unsafe_view", "expand"})


def _relabel(node: fx.Node, old: int, new: int) -> None:
    """The literal size of a reshaping that was the old length: the first behind the batch (a head can be as wide)."""
    shape = list(args_of(node)[1])
    for axis, size in enumerate(shape):
        if axis > 0 and isinstance(size, int) and size == old:
            shape[axis] = new
            break
    node.args = (node.args[0], shape, *node.args[2:])


def _propagate(program: Program, node: fx.Node) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with program.fake_mode, torch.no_grad():
        target: Any = node.target if node.op == "call_function" else program.graph.get_submodule(str(node.target))
        return target(*args, **kwargs)


def _shapes(value: Any) -> Any:
    if isinstance(value, Sequence):
        return [_shapes(v) for v in value]
    return str(tuple(value.shape)) if isinstance(value, Tensor) else str(value)
