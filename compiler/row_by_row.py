"""Whether a node makes row i of its result of row i of its operands alone; rows are the one dimension of a given size.

A size is the expression that the capture gave it (s21 + s85), so that no other dimension is taken for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .nodes import op_name

_MOVES = frozenset({"unsqueeze", "squeeze", "transpose", "permute", "movedim", "swapaxes", "expand", "contiguous",
                    "clone", "to", "_to_copy", "alias", "detach", "type_as", "t", "mT", "numpy_T"})  # fmt: skip
_FOLDS = frozenset({"view", "reshape", "_unsafe_view", "flatten", "unflatten"})
_LIKE = frozenset({"ones_like", "zeros_like", "full_like"})
_ALONG = frozenset({"select", "index_select", "cat", "repeat_interleave", "sum", "mean", "amax", "amin",
                    "softmax", "_softmax", "log_softmax", "cumsum", "split", "split_with_sizes", "chunk",
                    "glu"})  # fmt: skip
_ENDS = frozenset({"layer_norm", "rms_norm"})


def row_dim(value: Any, rows: str) -> int | None:
    """The dimension of a tensor that is `rows` long; None where none is, or several are."""
    if not isinstance(value, Tensor):
        return None
    found = [dim for dim, size in enumerate(value.shape) if said(size) == rows]
    return found[0] if len(found) == 1 else None


def said(size: Any) -> str:
    """A size as the expression that it was captured as."""
    return str(size.node.expr) if isinstance(size, torch.SymInt) else str(size)


def keeps_rows(node: fx.Node, rows: str) -> bool:
    """Whether a node's rows are made of the same rows of those operands that have any."""
    into, name = row_dim(node.meta.get("val"), rows), op_name(node)
    given = [n for n in node.all_input_nodes if row_dim(n.meta.get("val"), rows) is not None]
    if into is None or not given:
        return False
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return all(_from_the_end(n.meta["val"], rows) == _from_the_end(node.meta["val"], rows) for n in given)
    if name in _MOVES or name in _LIKE:
        return True
    first = node.all_input_nodes[0]
    if name == "matmul":
        return given == [node.args[0]] and _from_the_end(first.meta["val"], rows) > 1
    if given[0] is not first:
        return False
    before: Tensor = first.meta["val"]
    at = row_dim(before, rows)
    assert at is not None
    if name in _FOLDS:
        return _numbers(before.shape[:at]) == _numbers(node.meta["val"].shape[:into])
    if name in ("slice", "narrow"):  # as many rows as before are all of them
        return True
    if name in _ALONG:
        return all(dim % before.ndim != at for dim in _dims(node)) and bool(_dims(node))
    if name in _ENDS:
        return at < before.ndim - len(node.args[1])  # type: ignore[arg-type]
    if name == "linear":
        return given == [first] and at < before.ndim - 1
    if name == "index":
        indices: Sequence[Any] = node.args[1]  # type: ignore[assignment]
        return at >= len(indices) or indices[at] is None
    return False


def _from_the_end(value: Tensor, rows: str) -> int:
    dim = row_dim(value, rows)
    assert dim is not None
    return value.ndim - dim


def _numbers(sizes: Sequence[Any]) -> str:
    return said(math.prod(sizes))


def _dims(node: fx.Node) -> tuple[int, ...]:
    """The dimensions along which an operator works, as its schema names them."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
    for place, argument in enumerate(schema.arguments):
        if argument.name == "dim":
            default = argument.default_value
            given = node.args[place] if place < len(node.args) else node.kwargs.get("dim", default)
            dims = given if isinstance(given, list | tuple) else [given]
            return tuple(d for d in dims if isinstance(d, int))
    return ()
