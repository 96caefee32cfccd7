"""Whether queries and keys are rows of the same tokens: both walked back, row by row, to what they are made of.

Latents, norms and projections (DeepSeek's MLA) keep a token's row where it is; attention, pooling, a slice or a flip
along the tokens, or another hidden state do not, and the walk ends there. The same ends mean the same rows.
"""

from __future__ import annotations

import operator
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import fx

from .nodes import args_of, op_name

ALONG_ROWS = frozenset(  # what one row of the result needs is that row of each operand
    {"linear", "layer_norm", "rms_norm", "mul", "add", "sub", "div", "neg", "pow", "rsqrt", "sqrt"}
    | {"to", "_to_copy", "type_as", "clone", "contiguous", "alias", "detach", "dropout", "relu", "gelu", "silu"}
    | {"tanh", "sigmoid", "lift_fresh_copy", "detach_"}
)
ONE_DIM = frozenset({"slice", "select", "split", "split_with_sizes", "chunk", "mean"})
VIEWS = frozenset({"view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "flatten", "unflatten"})
Row = tuple[fx.Node, int]  # a tensor and its axis of tokens


def same_rows(x: fx.Node, x_kv: fx.Node, *, behind_past: bool) -> bool:
    """Whether row i of both comes of the same token; behind_past: keys may follow on those that a call is given."""
    ends = _ends((x, _rank(x) - 2), behind_past)
    tokens = any(axis >= 0 and str(node.meta["val"].shape[axis]) != "1" for node, axis in ends)
    return tokens and ends == _ends((x_kv, _rank(x_kv) - 2), behind_past)


def _ends(start: Row, behind_past: bool) -> set[Row]:
    """Where the walk back from a tensor's rows ends."""
    todo, seen, ends = [start], {start}, set()
    while todo:
        row = todo.pop()
        sources = _sources(row, behind_past)
        if sources is None:
            ends.add(row)
            continue
        todo += [s for s in sources if s not in seen]
        seen |= set(sources)
    return ends


def _sources(row: Row, behind_past: bool) -> list[Row] | None:
    """The rows that a row is made of; None where it is made of other rows too, or of nothing."""
    node, axis = row
    name = "getitem" if node.target is operator.getitem else op_name(node)
    source: Any = node.args[0] if node.args else None
    if axis < 0 or (name not in ("cat", "getitem") and not isinstance(source, fx.Node)):
        return None
    if name in ALONG_ROWS:
        return _operands(node, axis, name)
    if name == "getitem":
        inner = isinstance(source, fx.Node) and op_name(source) in ("split", "split_with_sizes", "chunk")
        return _sources((source, axis), behind_past) if inner else None
    if name == "cat":
        return _joined(node, axis, behind_past)
    if name in VIEWS:
        return _viewed(node, axis, source)
    if name == "transpose":
        dims: Any = node.args[1:3]
        one, other = (int(dim) % _rank(node) for dim in dims)
        return [(source, {one: other, other: one}.get(axis, axis))]
    if name == "permute":
        order: Any = node.args[1]
        return [(source, order[axis] % _rank(source))]
    return _beside(node, name, axis, source)


def _operands(node: fx.Node, axis: int, name: str) -> list[Row] | None:
    """Operands by the axis that meets the result's; numbers of a layer are no rows."""
    behind = _rank(node) - axis
    over: Any = 1 if name == "linear" else len(args_of(node)[1]) if name in ("layer_norm", "rms_norm") else 0
    if behind <= over:  # mixes tokens
        return None
    given = node.all_input_nodes[: 1 if name in ("linear", "layer_norm", "rms_norm") else None]
    return [(n, _rank(n) - behind) for n in given if n.op != "get_attr" and _rank(n) > 0]


def _joined(node: fx.Node, axis: int, behind_past: bool) -> list[Row] | None:
    parts: Any = node.args[0]
    dim = (args_of(node)[1] if len(args_of(node)) > 1 else 0) % _rank(node)
    if dim != axis:
        return [(part, axis) for part in parts]
    full = [part for part in parts if not any(isinstance(n, int) and n == 0 for n in part.meta["val"].shape)]
    given = all(_given(part) for part in full[:-1])
    return [(full[-1], axis)] if full and (len(full) == 1 or (behind_past and given)) else None


def _given(node: fx.Node) -> bool:
    """What a call is given, in another type at most."""
    while op_name(node) in ("to", "_to_copy", "alias", "detach"):
        node = args_of(node)[0]
    return node.op == "placeholder"


def _viewed(node: fx.Node, axis: int, source: fx.Node) -> list[Row] | None:
    """The axis of the source that has as many rows, and as many numbers in front of it."""
    before, after = source.meta["val"].shape, node.meta["val"].shape
    ahead = str(prod(after[:axis]))
    fitting = (k for k, n in enumerate(accumulate(before, operator.mul, initial=1)) if str(n) == ahead)
    return next(([(source, k)] for k in fitting if k < len(before) and str(before[k]) == str(after[axis])), None)


def _beside(node: fx.Node, name: str, axis: int, source: fx.Node) -> list[Row] | None:
    """Parts and means along other dimensions than the tokens'."""
    if name not in ONE_DIM:
        return None
    place = 2 if name in ("split", "split_with_sizes", "chunk") else 1
    said: Any = node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0)
    dims = {dim % _rank(source) for dim in (said if isinstance(said, list | tuple) else [said])}
    lost = name == "select" or (name == "mean" and not (len(node.args) > 2 and node.args[2]))
    return None if axis in dims or (lost and min(dims) < axis) else [(source, axis)]


def _rank(node: Any) -> int:
    value = node.meta.get("val")
    return value.ndim if isinstance(value, torch.Tensor) else 0
