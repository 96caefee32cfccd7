"""A `group` folded into what attends its rows: the call reads them where they lie, in front of a GPU's kernels."""

from __future__ import annotations

import operator
from dataclasses import replace

from torch import fx

from .ports import aten
from .primitives.attend_spec import AttendSpec
from .primitives.group import GroupSpec, group_op


def read_in_groups(attend: fx.Node) -> bool:
    """A call that attends the rows of a group reads them itself; whether it does."""
    q, kv, tables, text = attend.args
    spec = AttendSpec.of(str(text))
    found = [_group(t) for t in kv]  # type: ignore[union-attr, arg-type]
    if len(found) != 2 or not all(found) or not _in_order(spec):
        return bool(spec.group_rows)
    of_k, of_v = found
    if of_k.args[1] is not of_v.args[1]:  # type: ignore[union-attr]
        return False
    index: fx.Node = of_k.args[1]  # type: ignore[union-attr, assignment]
    if index.meta["val"].ndim == 4:  # (B, 1, G, S)
        with attend.graph.inserting_before(attend):
            index = _made(attend.graph, aten.flatten.using_ints, index, 0, 2)
    more = [*tables, index]  # type: ignore[misc]
    grouped = replace(spec, group_rows=f"t{len(more) - 1}").text
    attend.args = (q, [g.args[0] for g in found], more, grouped)  # type: ignore[union-attr]
    for rows in dict.fromkeys(kv):  # type: ignore[arg-type]
        _erased(rows)
    for node in dict.fromkeys(found):
        _of_one_channel(node)  # type: ignore[arg-type]
    return True


def _group(rows: fx.Node) -> fx.Node | None:
    """The group whose rows (B, H, G, S, D) these are as (B * G, H, S, D); one for all heads, of all rows there are."""
    steps = ((aten.flatten.using_ints, (0, 1)), (aten.transpose.int, (1, 2)), (operator.getitem, (0,)))
    node = rows
    for target, rest in steps:
        if node.op != "call_function" or node.target is not target or node.args[1:] != rest:
            return None
        node = node.args[0]  # type: ignore[assignment]
    if node.target is not group_op.op or node.args[2] or node.args[3] != GroupSpec().text:
        return None
    index = node.args[1].meta["val"]  # type: ignore[union-attr]
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


def _made(graph: fx.Graph, target: object, of: object, *rest: int) -> fx.Node:
    node = graph.call_function(target, (of, *rest))  # type: ignore[arg-type]
    node.meta["val"] = target(of.meta["val"], *rest)  # type: ignore[operator, attr-defined]
    return node


def _erased(node: fx.Node) -> None:
    """The node, and what was there only for it."""
    if not node.users:
        before = node.all_input_nodes
        node.graph.erase_node(node)
        for one in before:
            if one.op == "call_function" and one.target in (aten.transpose.int, operator.getitem):
                _erased(one)
