"""A softmax divided by its own sum, which is 1: what was added to that sum stays as a number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from ..nodes import args_of, op_name
from .axes import Group, Groups, leaves
from .constants import constant
from .layout import argument, data_users
from .totals import Change, Total, sum_below, through


def divided_by_own_sum(weights: fx.Node, groups: Groups, columns: Group) -> tuple[fx.Node, float] | None:
    """(the division, the number that each row is divided by); None where the weights are used in any other way."""
    users = data_users(weights)
    for node in users:
        total = _total(node, weights)
        if total is None or leaves(groups[total.dim]) != leaves(columns):
            continue
        number = _changed(total)
        if number is not None and all(u is node or _leads_to(u, total) for u in users):
            return node, number
    return None


def _total(node: fx.Node, weights: fx.Node) -> Total | None:
    """What the weights are divided by here, read back to their sum."""
    given: tuple[Any, ...] = args_of(node)[:2]
    if op_name(node) == "div" and given[0] is weights and not argument(node, 2, "rounding_mode"):
        beside = given[1]
    elif op_name(node) == "mul" and weights in given:
        beside = given[0] if given[1] is weights else given[1]
    else:
        return None
    found = sum_below(node, weights, beside) if isinstance(beside, fx.Node) and beside is not weights else None
    return found[0] if found is not None and through(args_of(found[0].node)[0]) is through(weights) else None


def _leads_to(node: fx.Node, total: Total) -> bool:
    """The sum itself, or a cast in front of it."""
    while node is not total.node:
        users = data_users(node)
        if len(users) != 1 or through(node) is node:
            return False
        node = users[0]
    return True


_CHANGES: dict[str, Callable[[float, float], float]] = {"add": lambda a, b: a + b, "maximum": max, "clamp_min": max}


def _changed(total: Total) -> float | None:
    """1 after the steps on the sum; None where one of them is no step with a number, or leaves nothing to divide by."""
    number = 1.0
    for change in reversed(total.changes):
        changed = _step(change, number)
        if changed is None:
            return None
        number = changed
    return number if number > 0 else None


def _step(change: Change, number: float) -> float | None:
    node, name = change.node, op_name(change.node)
    if name == "clamp":
        low, high = argument(node, 1, "min"), argument(node, 2, "max")
        if any(isinstance(x, fx.Node) for x in (low, high)):
            return None
        raised = number if low is None else max(number, float(low))
        return raised if high is None else min(raised, float(high))
    other = constant(change.other)
    if name not in _CHANGES or other is None or node.kwargs:
        return None
    return _CHANGES[name](number, float(other))
