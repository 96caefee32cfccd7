"""A `group` folded into what attends its rows: the call reads them where they lie, in front of a GPU's kernels."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

from torch import fx

from .nodes import args_of
from .ports import aten
from .primitives.attend_spec import AttendSpec
from .primitives.group import GroupSpec, group_op


def read_in_groups(attend: fx.Node) -> bool:
    """A call that attends the rows of a group reads them itself; whether it does."""
    q, kv, tables, text = args_of(attend)
    spec = AttendSpec.of(str(text))
    found = [node for node in map(_group, kv) if node is not None]
    if len(found) != 2 or len(kv) != 2 or not _in_order(spec):
        return bool(spec.group_rows)
    of_k, of_v = found
    if args_of(of_k)[1] is not args_of(of_v)[1]:
        return False
    index: fx.Node = args_of(of_k)[1]
    if index.meta["val"].ndim == 4:  # (B, 1, G, S)
        with attend.graph.inserting_before(attend):
            index = _made(attend.graph, aten.flatten.using_ints, index, 0, 2)
    more = [*tables, index]
    grouped = replace(spec, group_rows=f"t{len(more) - 1}").text
    attend.args = (q, [args_of(g)[0] for g in found], more, grouped)
    for rows in dict.fromkeys(kv):
        _erased(rows)
    for node in dict.fromkeys(found):
        _of_one_channel(node)
    return True


def _group(rows: fx.Node) -> fx.Node | None:
    """The group whose rows (B, H, G, S, D) these are as (B * G, H, S, D); one for all heads, of all rows there are."""
    steps = ((aten.flatten.using_ints, (0, 1)), (aten.transpose.int, (1, 2)), (operator.getitem, (0,)))
    node = rows
    for target, rest in steps:
        if node.op != "call_function" or node.target is not target or node.args[1:] != rest:
            return None
        node = args_of(node)[0]
    if node.target is not group_op.op or node.args[2] or node.args[3] != GroupSpec().text:
        return None
    index = args_of(node)[1].meta["val"]
    return node if index.ndim == 2 or (index.ndim == 4 and index.shape[1] == 1) else None


def _in_order(spec: AttendSpec) -> bool:
    """Whether nothing else says where the keys of a call lie."""
    else_said = (spec.more, any(spec.rows), spec.k_positions, spec.tiles, spec.kv_heads, spec.leader, spec.stored)
    of_keys = any(side == "k" for _, _, side in spec.relative)
    return not any(else_said) and not of_keys and spec.align == "start" and not set(spec.outputs) - {"o", "lse"}


def _of_one_channel(group: fx.Node) -> None:
    """A group of which only is asked what it holds has as little as can be to move."""
    if not group.users:
        _erased(group)
    elif all(user.target is operator.getitem and user.args[1] == 1 for user in group.users):
        with group.graph.inserting_before(group):
            group.update_arg(0, _made(group.graph, aten.slice.Tensor, group.args[0], 3, 0, 1))


def _made(graph: fx.Graph, target: Any, of: Any, *rest: int) -> fx.Node:
    node = graph.call_function(target, (of, *rest))
    node.meta["val"] = target(of.meta["val"], *rest)
    return node


def _erased(node: fx.Node) -> None:
    """The node, and what was there only for it."""
    if not node.users:
        before = node.all_input_nodes
        node.graph.erase_node(node)
        for one in before:
            if one.op == "call_function" and one.target in (aten.transpose.int, operator.getitem):
                _erased(one)
