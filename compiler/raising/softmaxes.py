"""Every spelling of a softmax over one dimension: the fused operators, and exp divided by its sum written by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..nodes import args_of, op_name
from .axes import Groups, aligned
from .constants import constant
from .layout import CASTS, KEEPING, VIEWS, argument, back, tensor_of
from .near import Unraised
from .totals import Change, Total, is_constant_along, sum_below, through, total_of
from .zero_one import is_zero_one

EXPONENTIALS = frozenset({"exp", "exp2"})
FUSED = frozenset({"softmax", "_softmax", "_safe_softmax", "special_softmax"})


Sink = float | tuple[fx.Node, Groups]  # a logit for each row


@dataclass(frozen=True)
class Softmax:
    """`node` is the softmax of `scores` over dimension `dim`."""

    node: fx.Node
    scores: fx.Node
    dim: int
    inside: frozenset[fx.Node] = frozenset()  # nodes of a hand-written one
    factor: float = 1.0  # on the scores: exp2(x) is exp(x log 2)
    kept: tuple[tuple[fx.Node, bool], ...] = ()  # masks put on the exponentials: (mask, whether true means kept)
    sink: Sink | None = None  # what the sum has beside the exponentials of the scores
    axes: Groups = ()  # of the scores, where the sink's refer to them


@dataclass(frozen=True)
class Shift:
    """Scores with something constant along the softmax subtracted, which changes no weight."""

    scores: fx.Node
    taken: fx.Node
    inside: frozenset[fx.Node]


def softmax_at(node: fx.Node) -> Softmax | None:
    name = op_name(node)
    if name in FUSED and tensor_of(node) is not None:
        return Softmax(node, args_of(node)[0], _dim(node, args_of(node)[1]))
    if name == "exp":
        return _exp_of_logs(node)
    if name in ("div", "mul", "true_divide"):
        return _divided_by_sum(node)
    return None


def _dim(node: Any, dim: Any) -> int:
    return int(dim % tensor_of(node).ndim)


def _exp_of_logs(node: fx.Node) -> Softmax | None:
    """exp(log_softmax(x)) and exp(x - logsumexp(x)), with softplus or logaddexp around it for a sink."""
    inner = through(node.args[0])
    if op_name(inner) in ("log_softmax", "_log_softmax"):
        return Softmax(node, args_of(inner)[0], _dim(inner, args_of(inner)[1]), frozenset({inner}))
    if op_name(inner) != "sub" or any(tensor_of(a) is None for a in inner.args[:2]) or inner.kwargs:
        return None
    scores = inner.args[0]
    total = total_of(inner.args[1], scores, "logsumexp")
    if total is None or through(total.node.args[0]) is not through(scores):
        return None
    sink: Any = None
    for change in total.changes:
        if sink is not None:
            return None
        sink = _beside_the_log(change)
        if sink is None or not total.is_one_a_row(change):
            return None
    inside = frozenset({inner, *_within(total)})
    return Softmax(node, scores, total.dim, inside, sink=sink, axes=total.axes)  # type: ignore[arg-type]


def _beside_the_log(change: Change) -> Sink | None:
    """0 of softplus(l) = log(exp(l) + exp(0)), u of logaddexp(l, u)."""
    if op_name(change.node) == "softplus":
        return 0.0 if change.node.args[1:] in ((), (1,), (1, 20)) else None
    if op_name(change.node) != "logaddexp":
        return None
    number = constant(change.other)
    return (change.other, change.groups) if number is None else float(number)


def _divided_by_sum(node: fx.Node) -> Softmax | None:
    """e / e.sum(dim) and e * (1 / e.sum(dim)), where e is exp(x), perhaps masked."""
    given: tuple[Any, ...] = node.args
    for top, bottom in (given[:2], given[1::-1])[: 2 if op_name(node) == "mul" else 1]:
        if tensor_of(top) is None or tensor_of(bottom) is None or argument(node, 2, "rounding_mode"):
            continue
        found = _exponential(top)
        below = sum_below(node, top, bottom) if found is not None else None
        if found is not None and below is not None and _same(below[0].node.args[0], top):
            (scores, inside, kept), (total, over) = found, below
            fused = next((n for n in inside if op_name(n) in FUSED), None)
            if fused is not None and (total.changes or total.dim != _dim(fused, fused.args[1])):
                raise Unraised(node, "masked weights are divided by something else than their sum")
            sink = _sink_of(node, scores, total, masked=bool(kept))
            inside |= {*over, *_within(total), through(total.node.args[0])}
            factor = math.log(2.0) if any(op_name(n) == "exp2" for n in inside) else 1.0
            return Softmax(node, scores, total.dim, frozenset(inside), factor, kept, sink, total.axes)
    return None


NEGLIGIBLE = 1e-6  # beside a sum that is at least 1: a few last places of float32


def _sink_of(node: fx.Node, scores: fx.Node, total: Total, *, masked: bool) -> Sink | None:
    """The logit of what the sum has beside the exponentials; what changes nothing is none."""
    shift = shift_of(through(scores), total.dim)
    sink: Sink | None = None
    for change in total.changes:
        number = constant(change.other)
        if shift is not None and not masked and _changes_nothing(change, number):
            continue
        alone = op_name(change.node) == "add" and sink is None and total.is_one_a_row(change)
        found = _added(change, number, shift) if alone else None
        if found is None:
            raise Unraised(node, f"the sum is changed by %{change.node.name} before it divides")
        sink = found
    return sink


def _changes_nothing(change: Change, number: float | None) -> bool:
    """The largest exponential is 1, so the sum is at least 1."""
    if number is None:
        return False
    if op_name(change.node) == "add":
        return 0 <= number <= NEGLIGIBLE and not change.node.kwargs
    return number <= 1 and argument(change.node, 2, "max") is None


def _added(change: Change, number: float | None, shift: Shift | None) -> Sink | None:
    """log(c) of sum + c, u of sum + exp(u); where c was subtracted from the scores, u of sum + exp(u - c)."""
    if change.node.kwargs:
        return None
    if number is not None:
        return math.log(number) if number > 0 and shift is None else None
    node, groups = _behind(change.other, change.groups)
    if op_name(node) != "exp":
        return None
    return (args_of(node)[0], groups) if shift is None else _unshifted(args_of(node)[0], groups, shift)


def _unshifted(exponent: Any, groups: Groups, shift: Shift) -> Sink | None:
    """u of u - c, and 0 of -c."""
    node, groups = _behind(exponent, groups)
    given: tuple[Any, ...] = node.args[1::-1] if op_name(node) == "rsub" else node.args[:2]
    if op_name(node) == "neg" and _is(given[0], shift.taken):
        return 0.0
    if op_name(node) not in ("sub", "rsub") or node.kwargs or not _is(given[1], shift.taken):
        return None
    number = constant(given[0])
    return (given[0], aligned(tensor_of(given[0]), groups)) if number is None else float(number)


def _behind(node: Any, groups: Groups) -> tuple[fx.Node, Groups]:
    while (moved := back(node, groups)) is not None:
        node, groups = moved
    return node, groups


def _is(one: Any, other: Any) -> bool:
    return through(one, views=True) is through(other, views=True)


def _same(one: object, other: object) -> bool:
    """One node, or one exponential written twice."""
    a, b = through(one), through(other)
    return a is b or (op_name(a) == op_name(b) in EXPONENTIALS and through(a.args[0]) is through(b.args[0]))


def is_exponential(node: fx.Node) -> bool:
    return tensor_of(node) is not None and _exponential(node) is not None


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
            node = args_of(node)[0]
        elif op_name(node) == "masked_fill" and node.args[2] == 0:
            kept.append((args_of(node)[1], False))
            node = args_of(node)[0]
        elif op_name(node) == "mul" and _factor(node) is not None:
            rest, mask = _factor(node)  # type: ignore[misc]
            kept.append((mask, True))
            node = rest
        elif kept and op_name(node) in FUSED:
            break  # the exponential of scores less their logsumexp
        else:
            return None
    return args_of(node)[0], inside | {node}, tuple(kept)


def _factor(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """What is multiplied with zeros and ones, and these."""
    given: tuple[Any, ...] = node.args
    for rest, factor in (given[:2], given[1::-1]):
        mask = _truth(factor) if tensor_of(rest) is not None else None
        if mask is not None and tensor_of(rest).shape == tensor_of(node).shape:
            return rest, mask
    return None


def _truth(node: object) -> fx.Node | None:
    """The boolean tensor that a factor is made of, or the factor itself where it is zeros and ones."""
    value, factor = tensor_of(node), node
    while value is not None and op_name(node) in CASTS and value.dtype.is_floating_point:
        node = args_of(node)[0]
        value = tensor_of(node)
    if value is not None and value.dtype == torch.bool:
        return node  # type: ignore[return-value]
    return factor if is_zero_one(factor) else None  # type: ignore[return-value]


def shift_of(node: fx.Node, dim: int) -> Shift | None:
    """x where node is x - c, c is made of x (its maximum, in one spelling or another) and constant along `dim`."""
    if op_name(node) != "sub" or tensor_of(node.args[1]) is None or node.kwargs.get("alpha", 1) != 1:
        return None
    scores, taken = node.args[0], node.args[1]
    path = _path(taken, through(scores)) if tensor_of(scores) is not None else None  # type: ignore[arg-type]
    if path is None or not is_constant_along(taken, node, dim):
        return None
    return Shift(scores, taken, frozenset({node, *path}))  # type: ignore[arg-type]


REDUCING = frozenset(
    {"amax", "max", "logsumexp", "mean", "detach", "getitem", "where", "isfinite", "isinf", "zeros_like"}
)
REDUCING |= (
    VIEWS
    | KEEPING
    | CASTS
    | {"expand", "clamp_min", "clamp", "relu", "maximum", "nan_to_num", "full_like", "eq", "masked_fill"}
)


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
        if node.op in ("get_attr", "placeholder"):
            continue
        if node.op != "call_function" or name not in REDUCING:
            return None
        if node not in found:
            found.add(node)
            queue.extend(n for n in node.all_input_nodes if tensor_of(n) is not None or name == "getitem")
    return found if reached and not queue else None


_BESIDE = CASTS | KEEPING | VIEWS | {"expand", "exp", "neg", "sub", "rsub", "zeros_like"}


def _within(total: Total) -> set[fx.Node]:
    """The nodes of a sum, those of the terms beside the exponentials included."""
    found = set(total.inside)
    for change in total.changes:
        node = change.other
        while op_name(node) in _BESIDE:
            found.add(node)
            node = None if op_name(node) in ("sub", "rsub") else node.args[0]
    return found
