"""A cache layer's keys in a captured graph: the past ones, the joining with new ones, how many came before.

Where a layer keeps something shorter than all its keys, the number of keys that ever came is an input of its own, and
every place that asked how long the past is asks that.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .nodes import op_name
from .program import insert_before
from .refusal import Refused
from .tracing import trace_function

LENGTH = "cumulative_length"
# unlike sizes: none is taken for another
EXAMPLES: Mapping[str, tuple[int, ...]] = {"k": (2, 2, 13, 8), "q": (2, 2, 3, 8), "length": (11, 0), "told": (5, 14)}


@dataclass(frozen=True)
class Entered:
    """One such layer in the graph: its inputs."""

    path: str
    keys: fx.Node
    values: fx.Node
    length: fx.Node
    seen: fx.Node  # how many keys came before this call

    @property
    def states(self) -> Mapping[str, fx.Node]:
        return {f"{self.path}.keys": self.keys, f"{self.path}.values": self.values}


def enter(graph: fx.Graph, path: str, inputs: Mapping[str, fx.Node]) -> Entered:
    keys, values = inputs[f"{path}.keys"], inputs[f"{path}.values"]
    with graph.inserting_after(values):
        length = graph.placeholder(f"{path}.{LENGTH}".replace(".", "_"))
    length.meta["val"] = torch.empty(EXAMPLES["length"])
    last = list(graph.find_nodes(op="placeholder"))[-1]
    with graph.inserting_after(last):
        seen = graph.call_function(torch.ops.aten.sym_size.int, (length, 0))
    seen.meta["val"] = keys.meta["val"].shape[2]
    for past in (keys, values):
        for user in [u for u in past.users if op_name(u) == "sym_size" and u.args[1] in (2, -2)]:
            user.replace_all_uses_with(seen)
            graph.erase_node(user)
    return Entered(path, keys, values, length, seen)


def joined(layer: Entered, past: fx.Node) -> fx.Node:
    """The node that puts new rows behind the past ones."""
    users = [u for u in past.users if op_name(u) != "sym_size"]
    if len(users) != 1 or op_name(users[0]) != "cat" or list(users[0].args[0])[:1] != [past]:  # type: ignore[arg-type]
        found = f"the past is read by {', '.join(op_name(u) for u in users) or 'nothing'}"
        raise Refused(found, where=layer.path, fits="a cache that only grows: cat(past, new)")
    return users[0]


def count_from_the_start(layer: Entered, cat: fx.Node) -> None:
    """How many rows there are with the new ones is how many ever came, wherever it is asked for."""
    for user in [u for u in cat.users if op_name(u) == "sym_size" and u.args[1] in (2, -2)]:
        with cat.graph.inserting_before(user):
            new = cat.graph.call_function(torch.ops.aten.sym_size.int, (cat.args[0][1], 2))  # type: ignore[index]
            total = cat.graph.call_function(operator.add, (layer.seen, new))
        user.replace_all_uses_with(total)
        cat.graph.erase_node(user)


def without_whole_slices(node: fx.Node) -> None:
    """Slices that take everything, k[:, :], are their operand."""
    for user in list(node.users):
        if op_name(user) == "slice" and user.args[0] is node and _takes_all(user):
            without_whole_slices(user)
            user.replace_all_uses_with(node)
            node.graph.erase_node(user)


def _takes_all(node: fx.Node) -> bool:
    given: list[Any] = list(node.args[2:])
    start, end, step = given + [None, sys.maxsize, 1][len(given) :]
    return bool((start or 0, end, step) == (0, sys.maxsize, 1))


def like_rows(held: Tensor, length: int, of: tuple[int, int, str]) -> Tensor:
    """Zeros as large as keys or values of that many heads, that dimension and type; `held` has batch and device."""
    heads, dim, dtype = of
    return held.new_zeros((held.shape[0], heads, length, dim), dtype=getattr(torch, dtype))


def lengthened(output: fx.Node, layer: Entered, cat: fx.Node) -> fx.Node:
    """How many keys have come after this call, said as it is given."""
    new: fx.Node = cat.args[0][1]  # type: ignore[index,assignment]
    return put(
        output,
        lambda length, q: length.new_zeros(length.shape[0] + q.shape[2], 0),
        {"length": layer.length, "q": new},
        like=cat,
    )[0]


def put(
    before: fx.Node, function: Callable[..., Any], inputs: Mapping[str, fx.Node], *, like: fx.Node
) -> tuple[fx.Node, ...]:
    """The nodes of a function of k, q, length, told in front of a node; traced on sizes of its own."""
    device = next((n.meta["val"].device for n in inputs.values() if "val" in n.meta), None)
    fragment = trace_function(lambda *t: function(**dict(zip(inputs, t, strict=True))),
                              {n: torch.zeros(EXAMPLES[n], device=device) for n in inputs})  # fmt: skip
    return insert_before(before, fragment, inputs, like=like)[0]
