"""What stands in a rewritten graph when it runs: calls that torch has an operator for become it, idle ones go.

A primitive is one opaque call to torch, with Python in front of each run. Where torch says the same in an operator of
its own, the graph names that one: no detour, its own gradient, and a compiler sees through it.
"""

from __future__ import annotations

import operator
import sys
from typing import Any

from torch import fx

from .grouped_loads import read_in_groups
from .nodes import args_of, op_name
from .ports import ATTEND, RESHAPING, aten
from .primitives.attend import attend_op
from .primitives.attend_stored import read_as_stored
from .primitives.operator import called


def lower_calls(graph_module: fx.GraphModule, target: str = "auto") -> int:
    """Attends that torch can say, each by the first way that fits, and how many there were. A recipe's target decides
    otherwise: `eager` has every primitive as it is meant, `cpu` and `triton` leave all to their kernels.
    """
    count, made = 0, dict[Any, fx.Node]()
    attends = [
        n for n in graph_module.graph.find_nodes(op="call_function", target=ATTEND) if not _as_it_lies(n, target)
    ]
    for node in attends if target == "auto" else ():
        count += any(_replaced(node, way(node, made)) for way in attend_op.in_torch)
    for node in list(graph_module.graph.nodes) if target == "eager" else ():
        if node.op == "call_function" and (primitive := called(node.target)) is not None:
            node.target = primitive.eagerly
    for node in list(graph_module.graph.nodes):
        if _does_nothing(node):
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
    if count:
        graph_module.graph.eliminate_dead_code()
    graph_module.graph.lint()
    graph_module.recompile()
    return count


def _as_it_lies(attend: fx.Node, target: str) -> bool:
    """Whether a GPU's kernel reads what this call attends as it is stored, or where groups have it from; torch's own
    attention cannot."""
    if target == "triton" or args_of(attend)[0].meta["val"].device.type == "cuda":
        return read_as_stored(attend) or read_in_groups(attend)
    return False


def _replaced(attend: fx.Node, found: fx.Node | None) -> bool:
    """The output of an attend, a list of one, read from the node that stands for it."""
    if found is None:
        return False
    for output in list(attend.users):
        found.meta |= output.meta
        output.replace_all_uses_with(found)
        output.graph.erase_node(output)
    found.meta["site"] = attend.meta.get("site")
    attend.graph.erase_node(attend)
    _reshape_behind(found)
    return True


def _reshape_behind(node: fx.Node) -> None:
    """Views of the output become reshapes: torch's operators lay their output out as they like."""
    for user in list(node.users):
        name = op_name(user)
        if name in ("view", "_unsafe_view") and "leaf" in user.meta:  # part of a module's call, which stays as it is
            with user.graph.inserting_before(user):
                straight = user.graph.call_function(aten.contiguous.default, (node,))
            straight.meta = {k: v for k, v in node.meta.items() if k != "leaf"}
            user.replace_input_with(node, straight)
        elif name in ("view", "_unsafe_view"):
            user.target = aten.reshape.default
        if name in RESHAPING and "leaf" not in user.meta:
            _reshape_behind(user)


def only_reads_o(attend: fx.Node) -> bool:
    """Whether all that is asked of an attend is its first output."""
    return all(user.target is operator.getitem and user.args[1] == 0 for user in attend.users)


def _does_nothing(node: fx.Node) -> bool:
    """Dropout outside of training, and slices of everything."""
    name, args = op_name(node), node.args
    if "leaf" in node.meta:
        return False
    if name == "dropout":
        return len(args) == 3 and args[2] is False
    if name == "slice" and len(args) == 4:
        return bool(args[2] == 0 and args[3] == sys.maxsize)
    return False
