"""(e @ v) / e.sum(-1) is (e / e.sum(-1)) @ v: weights that are normalised behind the values are normalised in front of them."""

from __future__ import annotations

from torch import fx

from .build import Builder, aten
from .layout import VIEWS, argument, data_users, op_name, tensor_of
from .softmaxes import is_exponential, through


def normalise_first(graph: fx.Graph) -> None:
    """Move every such division in front of its product."""
    for node in list(graph.nodes):
        if op_name(node) == "div" and not argument(node, 2, "rounding_mode"):
            _move(node)


def _move(node: fx.Node) -> None:
    product, total = node.args
    weights = product.args[0] if op_name(product) in ("matmul", "bmm") else None  # type: ignore[union-attr]
    if weights is None or data_users(product) != [node] or not is_exponential(weights):  # type: ignore[arg-type]
        return
    if tensor_of(total) is None or not _is_row_sum(total, weights):  # type: ignore[arg-type]
        return
    builder = Builder(node, [])
    divided = builder.call(aten.div.Tensor, weights, total)
    again = builder.call(product.target, divided, product.args[1])  # type: ignore[union-attr, arg-type]
    node.replace_all_uses_with(again)
    graph = node.graph
    graph.erase_node(node)
    graph.erase_node(product)  # type: ignore[arg-type]


def _is_row_sum(total: fx.Node, weights: fx.Node) -> bool:
    """The sum of each row, standing as a column."""
    inner = through(total, views=True)
    rank = tensor_of(weights).ndim
    if op_name(inner) != "sum" or through(inner.args[0]) is not through(weights):
        return False
    dims = argument(inner, 1, "dim")
    straight = isinstance(dims, list | tuple) and [d % rank for d in dims] == [rank - 1]
    column = tensor_of(total).ndim == rank and tensor_of(total).shape[-1] == 1
    return straight and column and (inner is total or op_name(total) in VIEWS)
