"""A sum or a logsumexp of rows, wherever it stands: whether each row meets its own, and what was done to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from ..nodes import op_name
from .axes import Groups, aligned, all_leaves, fresh_groups, leaves, same
from .layout import CASTS, KEEPING, VIEWS, argument, back, tensor_of

STEPS = frozenset({"add", "maximum", "clamp", "clamp_min", "softplus", "logaddexp"})
LIMIT = 12  # nodes between the rows and their total


@dataclass(frozen=True)
class Change:
    """One step on a total: with what, and the axes that this has."""

    node: fx.Node
    other: Any
    groups: Groups


@dataclass(frozen=True)
class Total:
    """The reduction of rows over one dimension."""

    node: fx.Node
    dim: int
    axes: Groups  # of the rows
    changes: tuple[Change, ...]  # the last one first
    inside: frozenset[fx.Node]

    def is_one_a_row(self, change: Change) -> bool:
        return not set(leaves(self.axes[self.dim])) & set(all_leaves(change.groups))


def total_of(beside: Any, rows: Any, kind: str) -> Total | None:
    """What stands beside the rows, read back to a reduction of that kind that gives each row its own number."""
    axes = fresh_groups(tensor_of(rows))
    return total_among(beside, aligned(tensor_of(beside), axes), axes, kind)


def total_among(node: fx.Node, groups: Groups, axes: Groups, kind: str) -> Total | None:
    """The same of a node whose axes are known, among those of the rows."""
    inside: set[fx.Node] = set()
    changes: list[Change] = []
    while len(inside) < LIMIT:
        inside.add(node)
        if op_name(node) == kind:
            dim = _own(node, groups, axes)
            return None if dim is None else Total(node, dim, axes, tuple(changes), frozenset(inside))
        moved = back(node, groups)
        if moved is None:
            step = _step(node, kind)
            if step is None:
                return None
            inner, other = step
            there = aligned(tensor_of(other), groups) if tensor_of(other) is not None else ()
            changes.append(Change(node, other, there))
            moved = inner, aligned(tensor_of(inner), groups)
        node, groups = moved
    return None


def _own(node: fx.Node, groups: Groups, axes: Groups) -> int | None:
    """The dimension reduced, where the axes of the result are those of the rows without it."""
    dims: Any = argument(node, 1, "dim")
    if not isinstance(dims, list | tuple) or len(dims) != 1 or tensor_of(node.args[0]).ndim != len(axes):
        return None
    dim = int(dims[0] % len(axes))
    keep = argument(node, 2, "keepdim", False)
    wanted = (*axes[:dim], *([()] if keep else []), *axes[dim + 1 :])
    return dim if same(groups, wanted) else None


def _step(node: fx.Node, kind: str) -> tuple[fx.Node, Any] | None:
    """(what leads on to the total, the other operand)."""
    if op_name(node) not in STEPS or not node.args:
        return None
    first, other = node.args[0], node.args[1] if len(node.args) > 1 else None
    if _leads(first, kind):
        return first, other  # type: ignore[return-value]
    return (other, first) if _leads(other, kind) else None  # type: ignore[return-value]


def _leads(node: Any, kind: str) -> bool:
    node = through(node, views=True)
    return op_name(node) == kind or (op_name(node) in STEPS and any(_leads(a, kind) for a in node.args[:2]))


def is_constant_along(beside: Any, rows: Any, dim: int) -> bool:
    """Whether what stands beside the rows is one number for all of a row along this dimension."""
    axes = fresh_groups(tensor_of(rows))
    node, groups = beside, aligned(tensor_of(beside), axes)
    while set(leaves(axes[dim])) & set(all_leaves(groups)):
        moved = back(node, groups)
        if moved is None:
            return False
        node, groups = moved
    return True


def inversion(node: Any) -> list[fx.Node]:
    """The nodes from 1 / x back to its reciprocal, which torch multiplies by 1; none where this is something else."""
    passed = [node]
    while op_name(node) in CASTS | KEEPING or (op_name(node) == "mul" and node.args[1] == 1):
        node = node.args[0]
        passed.append(node)
    return passed if op_name(node) == "reciprocal" or (op_name(node) == "pow" and node.args[1] == -1) else []


def dividing(node: fx.Node, beside: fx.Node, groups: Groups) -> tuple[fx.Node, Groups, list[fx.Node]] | None:
    """What divides, with its axes: as it stands under the line, or inside the reciprocal that is multiplied with.

    Then also the nodes from the reciprocal on.
    """
    passed: list[fx.Node] = []
    if op_name(node) == "div":
        return beside, groups, passed
    while not (over := inversion(beside)):
        moved = back(beside, groups)
        if moved is None:
            return None
        passed.append(beside)
        beside, groups = moved
    return over[-1].args[0], groups, passed + over  # type: ignore[return-value]


def sum_below(node: fx.Node, rows: fx.Node, beside: fx.Node) -> tuple[Total, list[fx.Node]] | None:
    """The sum that a division of rows has below the line, and the nodes from its reciprocal on, if it has one."""
    axes = fresh_groups(tensor_of(rows))
    found = dividing(node, beside, aligned(tensor_of(beside), axes))
    total = total_among(found[0], found[1], axes, "sum") if found is not None else None
    return None if found is None or total is None else (total, found[2])


def through(node: Any, *, views: bool = False) -> fx.Node:
    """Past casts and copies, and past views where asked for."""
    passed = CASTS | KEEPING | (VIEWS | {"expand"} if views else frozenset())
    while op_name(node) in passed:
        node = node.args[0]
    return node
