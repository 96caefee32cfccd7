"""(e @ v) / e.sum(-1) is (e / e.sum(-1)) @ v: weights normalised behind the values are normalised in front of them."""

from __future__ import annotations

from typing import Any

from torch import fx

from .build import Builder, aten
from .layout import argument, data_users, op_name, tensor_of
from .products import product_of
from .softmaxes import is_exponential
from .totals import through, total_of


def normalise_first(graph: fx.Graph) -> None:
    """Move every such division in front of its product."""
    for node in list(graph.nodes):
        if op_name(node) == "div" and not argument(node, 2, "rounding_mode"):
            _move(node)


def _move(node: fx.Node) -> None:
    given: tuple[Any, ...] = node.args
    total = given[1]
    product = product_of(given[0]) if tensor_of(given[0]) is not None else None
    if (
        product is None
        or product.inside
        or data_users(product.node) != [node]
        or not is_exponential(product.operands[0])
    ):
        return
    weights = product.operands[0]
    rows = product.labels[0][:-1] == product.out[:-1] and product.labels[0][-1] in product.summed
    if not rows or tensor_of(total) is None or not _is_row_sum(total, weights):
        return
    builder = Builder(node, [])
    divided = builder.call(aten.div.Tensor, weights, total)
    moved = fx.node.map_arg(product.node.args, lambda n: divided if n is weights else n)
    again = builder.call(product.node.target, *moved, **product.node.kwargs)  # type: ignore[arg-type]
    node.replace_all_uses_with(again)
    node.graph.erase_node(node)
    node.graph.erase_node(product.node)


def _is_row_sum(total: fx.Node, weights: fx.Node) -> bool:
    """The sum of each row, standing as a column."""
    rank = tensor_of(weights).ndim
    found = total_of(total, weights, "sum") if tensor_of(total).ndim == rank else None
    if found is None or through(found.node.args[0]) is not through(weights):
        return False
    return found.dim == rank - 1 and bool(tensor_of(total).shape[-1] == 1)
