"""Every spelling of a softmax over one dimension: the fused operators, and exp divided by its sum written by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import fx

from .layout import CASTS, KEEPING, VIEWS, argument, op_name, tensor_of
from .near import Unraised

EXPONENTIALS = frozenset({"exp", "exp2"})
FUSED = frozenset({"softmax", "_softmax", "_safe_softmax", "special_softmax"})


@dataclass(frozen=True)
class Softmax:
    """`node` is the softmax of `scores` over dimension `dim`."""

    node: fx.Node
    scores: fx.Node
    dim: int
    inside: frozenset[fx.Node] = frozenset()  # nodes of a hand-written one
    factor: float = 1.0  # on the scores: exp2(x) is exp(x log 2)
    kept: tuple[tuple[fx.Node, bool], ...] = ()  # masks put on the exponentials: (mask, whether true means kept)


@dataclass(frozen=True)
class Shift:
    """Scores with something constant along the softmax subtracted, which changes no weight."""

    scores: fx.Node
    inside: frozenset[fx.Node]


def softmax_at(node: fx.Node) -> Softmax | None:
    name = op_name(node)
    if name in FUSED and tensor_of(node) is not None:
        return Softmax(node, node.args[0], _dim(node, node.args[1]))  # type: ignore[arg-type]
    if name == "exp":
        return _exp_of_logs(node)
    if name in ("div", "mul", "true_divide"):
        return _divided_by_sum(node)
    return None


def _dim(node: Any, dim: Any) -> int:
    return int(dim % tensor_of(node).ndim)


def _exp_of_logs(node: fx.Node) -> Softmax | None:
    """exp(log_softmax(x)) and exp(x - logsumexp(x))."""
    inner = through(node.args[0])
    if op_name(inner) in ("log_softmax", "_log_softmax"):
        return Softmax(node, inner.args[0], _dim(inner, inner.args[1]), frozenset({inner}))  # type: ignore[arg-type]
    if op_name(inner) != "sub":
        return None
    total = through(inner.args[1], views=True)
    if op_name(total) != "logsumexp" or through(total.args[0]) is not through(inner.args[0]):
        return None
    dims = total.args[1]
    if not isinstance(dims, list | tuple) or len(dims) != 1:
        return None
    between = {n for n in _down(inner.args[1]) if n is not total.args[0]}  # type: ignore[arg-type]
    dim = _dim(total.args[0], dims[0])
    return Softmax(node, inner.args[0], dim, frozenset({inner, total, *between}))  # type: ignore[arg-type]


def _divided_by_sum(node: fx.Node) -> Softmax | None:
    """e / e.sum(dim) and e * (1 / e.sum(dim)), where e is exp(x), perhaps masked."""
    given: tuple[Any, ...] = node.args
    for top, bottom in (given[:2], given[1::-1])[: 2 if op_name(node) == "mul" else 1]:
        if tensor_of(top) is None or tensor_of(bottom) is None or argument(node, 2, "rounding_mode"):
            continue
        total = through(bottom, views=True)
        if op_name(node) == "mul":
            if op_name(total) != "reciprocal" and not (op_name(total) == "pow" and total.args[1] == -1):
                continue
            total = through(total.args[0], views=True)
        if _is_negligible(total, top):
            total = next(through(n, views=True) for n in total.all_input_nodes)
        if _is_changed_sum(total, top):
            raise Unraised(node, f"the sum is changed by %{total.name} before it divides")
        if op_name(total) in ("clamp_min", "clamp") and _at_most_one(total) and _is_shifted(top):
            total = through(total.args[0], views=True)  # the largest exponential is 1, so the sum is at least 1
        dims = argument(total, 1, "dim") if op_name(total) == "sum" else None
        if not isinstance(dims, list | tuple) or len(dims) != 1 or not _same(total.args[0], top):
            continue
        found = _exponential(top)
        if found is not None:
            scores, inside, kept = found
            inside |= {*_down(bottom, until=total), total, through(total.args[0])}
            factor = math.log(2.0) if any(op_name(n) == "exp2" for n in inside) else 1.0
            return Softmax(node, scores, _dim(top, dims[0]), frozenset(inside), factor, kept)
    return None


NEGLIGIBLE = 1e-6  # beside a sum that is at least 1: a few last places of float32


def _is_negligible(total: fx.Node, top: fx.Node) -> bool:
    """sum + eps, where the largest exponential is 1."""
    added = total.args[1] if op_name(total) == "add" and len(total.args) > 1 else None
    return isinstance(added, int | float) and 0 <= added <= NEGLIGIBLE and _is_shifted(top)


def _same(one: object, other: object) -> bool:
    """One node, or one exponential written twice."""
    a, b = through(one), through(other)
    return a is b or (op_name(a) == op_name(b) in EXPONENTIALS and through(a.args[0]) is through(b.args[0]))


def _is_changed_sum(total: fx.Node, top: fx.Node) -> bool:
    """Something is added to the sum of the exponentials themselves."""
    if op_name(total) not in ("add", "maximum") or not is_exponential(top):
        return False
    sums = [through(n, views=True) for n in total.all_input_nodes]
    return any(op_name(n) == "sum" and through(n.args[0]) is through(top) for n in sums)


def is_exponential(node: fx.Node) -> bool:
    return tensor_of(node) is not None and _exponential(node) is not None


def _at_most_one(node: fx.Node) -> bool:
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    return isinstance(low, int | float) and low <= 1 and high is None


def _is_shifted(top: fx.Node) -> bool:
    found = _exponential(top)
    return found is not None and not found[2] and shift_of(found[0]) is not None


def _exponential(top: fx.Node) -> tuple[fx.Node, set[fx.Node], tuple[tuple[fx.Node, bool], ...]] | None:
    """What exp was taken of, through masks that set exponentials to 0."""
    inside: set[fx.Node] = set()
    kept: list[tuple[fx.Node, bool]] = []
    node = top
    while op_name(node) not in EXPONENTIALS:
        if node.op != "call_function":
            return None
        inside.add(node)
        if op_name(node) in CASTS | KEEPING:
            node = node.args[0]  # type: ignore[assignment]
        elif op_name(node) == "masked_fill" and node.args[2] == 0:
            kept.append((node.args[1], False))  # type: ignore[arg-type]
            node = node.args[0]  # type: ignore[assignment]
        elif op_name(node) == "mul" and _truth(node.args[1]) is not None:
            kept.append((_truth(node.args[1]), True))  # type: ignore[arg-type]
            node = node.args[0]  # type: ignore[assignment]
        else:
            return None
    return node.args[0], inside | {node}, tuple(kept)  # type: ignore[return-value]


def _truth(node: object) -> fx.Node | None:
    """The boolean tensor that a factor is made of."""
    value = tensor_of(node)
    while value is not None and op_name(node) in CASTS and value.dtype.is_floating_point:
        node = node.args[0]  # type: ignore[attr-defined]
        value = tensor_of(node)
    return node if value is not None and str(value.dtype) == "torch.bool" else None  # type: ignore[return-value]


def shift_of(node: fx.Node) -> Shift | None:
    """x where node is x - c and c is made of x (its maximum, in one spelling or another)."""
    if op_name(node) != "sub" or tensor_of(node.args[1]) is None or node.kwargs.get("alpha", 1) != 1:
        return None
    scores, taken = node.args[0], node.args[1]
    path = _path(taken, through(scores))  # type: ignore[arg-type]
    return None if path is None else Shift(scores, frozenset({node, *path}))  # type: ignore[arg-type]


REDUCING = frozenset(
    {"amax", "max", "logsumexp", "mean", "detach", "getitem", "where", "isfinite", "isinf", "zeros_like"}
)
REDUCING |= VIEWS | KEEPING | CASTS | {"expand", "clamp_min", "clamp", "nan_to_num", "full_like", "eq", "masked_fill"}


def _path(start: fx.Node, goal: fx.Node) -> set[fx.Node] | None:
    """The nodes from start back to goal, all of them reductions or what is done to their result."""
    found: set[fx.Node] = set()
    queue, reached = [start], False
    while queue and len(found) < 12:
        node = queue.pop()
        if node is goal or through(node) is goal:
            reached = True
            continue
        name = op_name(node) or getattr(node.target, "__name__", "")
        if node.op != "call_function" or name not in REDUCING:
            return None
        if node not in found:
            found.add(node)
            queue.extend(n for n in node.all_input_nodes if tensor_of(n) is not None or name == "getitem")
    return found if reached and not queue else None


def through(node: object, *, views: bool = False) -> fx.Node:
    """Past casts and copies, and past views where asked for."""
    passed = CASTS | KEEPING | (VIEWS | {"expand"} if views else frozenset())
    while op_name(node) in passed:
        node = node.args[0]  # type: ignore[attr-defined]
    return node  # type: ignore[return-value]


def _down(node: fx.Node, until: fx.Node | None = None) -> list[fx.Node]:
    found: list[fx.Node] = []
    while node.op == "call_function" and node is not until and len(found) < 6:
        found.append(node)
        if not node.args or not isinstance(node.args[0], fx.Node):
            break
        node = node.args[0]
    return found
