"""(e @ v) / e.sum(-1) is (e / e.sum(-1)) @ v: weights normalised behind the values are normalised in front of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import fx

from ..nodes import args_of, op_name
from .axes import Groups, aligned, all_leaves, extents, fresh, fresh_groups, leaves
from .build import Builder, aten
from .layout import KEEPING, TURNS, VIEWS, ahead, argument, back, data_users, tensor_of
from .near import Unraised
from .products import Product, product_of
from .softmaxes import is_exponential
from .totals import dividing, through, total_among

LIMIT = 6  # views between a product and its division


@dataclass(frozen=True)
class _Weighted:
    """A product of exponentials with values, the views around it, and where the axes of both are in the end."""

    exponentials: fx.Node
    rows: Groups
    steps: tuple[fx.Node, ...]  # from the exponentials to what is divided
    out: Groups


def normalise_first(graph: fx.Graph) -> None:
    """Move every such division in front of its product."""
    for node in list(graph.nodes):
        if op_name(node) == "div" and not argument(node, 2, "rounding_mode"):
            _move(node, node.args[0], node.args[1])
        elif op_name(node) == "mul" and not _move(node, *node.args[:2]):
            _move(node, *node.args[1::-1])


def _move(node: fx.Node, top: Any, below: Any) -> bool:
    found = _weighted(node, top) if tensor_of(top) is not None and tensor_of(below) is not None else None
    over = dividing(node, below, aligned(tensor_of(below), found.out)) if found is not None else None
    if found is None or over is None:
        return False
    divisor = over[:2]
    total = total_among(*divisor, found.rows, "sum")
    if total is None or through(total.node.args[0]) is not through(found.exponentials):
        return False
    if set(leaves(found.rows[total.dim])) & set(all_leaves(found.out)):
        return False
    column = tuple(() if d == total.dim else group for d, group in enumerate(found.rows))
    builder = Builder(node, [found.exponentials])
    try:
        by = builder.arranged(*divisor, column)
    except Unraised:
        return False
    now = builder.call(aten.div.Tensor, found.exponentials, by)
    was = found.exponentials
    for step in found.steps:
        was, now = step, builder.call(step.target, *_instead(args_of(step), was, now), **step.kwargs)  # type: ignore[arg-type]
    node.replace_all_uses_with(now)
    node.graph.erase_node(node)
    for step in reversed(found.steps):
        if not step.users:
            node.graph.erase_node(step)
    return True


def _instead(args: Any, was: fx.Node, now: fx.Node) -> Any:
    return fx.node.map_arg(args, lambda n: now if n is was else n)


def _weighted(node: fx.Node, top: fx.Node) -> _Weighted | None:
    """What stands behind a product of exponentials, both perhaps behind views; nobody else reads what is divided."""
    if extents(tensor_of(node)) != extents(tensor_of(top)):
        return None
    behind = _views(top, lambda n: product_of(n) is not None)
    read_once = all(data_users(a) == [b] for a, b in pairwise([*reversed(behind), node])) if behind else False
    product = product_of(behind[-1]) if read_once else None
    if product is None or product.inside:
        return None
    for side, operand in enumerate(product.operands):
        before = _views(operand, is_exponential)
        if before:
            rows = fresh_groups(tensor_of(before[-1]))
            weights = _followed(reversed(before[:-1]), rows)
            out = _followed(reversed(behind[:-1]), _product_groups(product, side, weights)) if weights else None
            steps = (*reversed(before[:-1]), *reversed(behind))
            return _Weighted(before[-1], rows, steps, out) if out is not None else None
    return None


def _views(node: fx.Node, wanted: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """The nodes from here back through views to what is wanted; none where that is not reached."""
    found = [node]
    while not wanted(node):
        moved = back(node, fresh_groups(tensor_of(node))) if op_name(node) in VIEWS | TURNS | KEEPING else None
        if moved is None or len(found) > LIMIT:
            return []
        node = moved[0]
        found.append(node)
    return found


def _followed(views: Iterable[fx.Node], groups: Groups) -> Groups | None:
    for view in views:
        moved = ahead(view, groups)
        if moved is None:
            return None
        groups = moved
    return groups


def _product_groups(product: Product, side: int, groups: Groups) -> Groups:
    """The axes of a product from those of one operand; what only the other one has is new."""
    known = dict(zip(product.labels[side], groups))
    for label, size in zip(product.labels[1 - side], tensor_of(product.operands[1 - side]).shape):
        known[label] = known.get(label) or fresh(size)
    return tuple(known[label] for label in product.out)
