"""Queries, keys and values behind a product: what can be taken off them, and which of their axes are heads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..nodes import args_of, op_name
from .axes import Axis, Group, Groups, all_leaves, fresh, leaves
from .constants import constant
from .layout import ahead, argument, back, data_users, is_upcast, tensor_of

PROJECTIONS = frozenset(
    {"linear", "addmm", "mm", "matmul", "conv1d", "conv2d", "convolution", "_convolution", "einsum"}
)


@dataclass(frozen=True)
class Stage:
    """An operand some steps further back: what of it is a factor on the score, and how much was gained."""

    node: fx.Node
    groups: Groups
    factor: float = 1.0
    gained: int = 0  # scalings, upcasts and repetitions taken off


def stages(node: fx.Node, groups: Groups) -> list[Stage]:
    """The operand itself, then every point further back through layout, casts and scaling by a number."""
    found = [Stage(node, groups)]
    alone = True
    while True:
        last = found[-1]
        alone = alone and len(data_users(last.node)) == 1
        following = _before(last, alone)
        if following is None:
            return found
        found.append(following)


def _before(stage: Stage, alone: bool) -> Stage | None:
    moved = back(stage.node, stage.groups)
    if moved is not None:
        source, groups = moved
        fewer = len(all_leaves(groups)) < len(all_leaves(stage.groups))
        return Stage(source, groups, stage.factor, stage.gained + (fewer or is_upcast(stage.node)))
    if op_name(stage.node) in ("mul", "div") and alone and not argument(stage.node, 2, "rounding_mode"):
        given: tuple[Any, ...] = stage.node.args
        source, number = given[0], constant(given[1])
        if number is None and op_name(stage.node) == "mul":
            source, number = given[1], constant(given[0])
        if number and tensor_of(source) is not None and tensor_of(source).ndim == len(stage.groups):
            factor = stage.factor * number if op_name(stage.node) == "mul" else stage.factor / number
            return Stage(source, stage.groups, factor, stage.gained + 1)
    return None


def without_factor(found: Sequence[Stage]) -> list[Stage]:
    """Values are not scaled into the score."""
    return [s for s in found if s.factor == 1.0]


def best(found: Sequence[Stage], wanted: tuple[Group, ...], optional: Iterable[Axis]) -> Stage:
    """The stage with most taken off that has every axis wanted but the optional ones; then the handiest layout."""
    skipped = set(optional)
    needed = {a for g in wanted for a in leaves(g)} - skipped
    fitting = [s for s in found if needed <= set(all_leaves(s.groups))]
    gained = max(s.gained for s in fitting)
    last = [s for s in fitting if s.gained == gained]
    return next((s for s in last if _is_turned(s, wanted)), last[0])


def _is_turned(stage: Stage, wanted: tuple[Group, ...]) -> bool:
    """Its dimensions are those wanted, in any order."""
    have = sorted(tuple(id(a) for a in leaves(g)) for g in stage.groups if leaves(g))
    there = set(all_leaves(stage.groups))
    want = sorted(tuple(id(a) for a in leaves(g) if a in there) for g in wanted if leaves(g))
    return have == [w for w in want if w] and len(stage.groups) == len(wanted)


def beside_features(found: Sequence[Groups], features: Group, never: Iterable[Axis]) -> set[Axis]:
    """Axes that share a dimension with the features somewhere: (H, D) was or becomes one dimension, so H are heads."""
    inner, outer = set(leaves(features)), set(never)
    heads: set[Axis] = set()
    for groups in found:
        for group in groups:
            axes = set(leaves(group))
            if axes & inner and not axes & outer:
                heads |= axes - inner
    return heads


def onward(node: fx.Node, groups: Groups, limit: int = 8) -> list[tuple[fx.Node, Groups]]:
    """The result further on, as long as it is only moved."""
    found = [(node, groups)]
    while len(found) < limit:
        users = data_users(found[-1][0])
        moved = ahead(users[0], found[-1][1]) if len(users) == 1 and users[0].op == "call_function" else None
        if moved is None:
            return found
        found.append((users[0], moved))
    return found


@dataclass(frozen=True)
class Origin:
    """The projection that an operand comes from, and its axes there, all and those along the features."""

    node: fx.Node
    trail: tuple[Groups, ...]
    features: frozenset[Axis]


def origin(node: fx.Node, groups: Groups, limit: int = 40) -> Origin | None:
    """Back through layout, selections, norms and other pointwise steps to the projection; None where it is lost."""
    trail = [groups]
    for _ in range(limit):
        if op_name(node) in PROJECTIONS and tensor_of(node) is not None:
            wide = 1 if "conv" in op_name(node) else len(groups) - 1
            return Origin(node, tuple(trail), frozenset(leaves(groups[wide])))
        moved = back(node, groups) or _selected(node, groups) or _pointwise(node, groups)
        if moved is None:
            return None
        node, groups = moved
        trail.append(groups)
    return None


def _selected(node: fx.Node, groups: Groups) -> tuple[fx.Node, Groups] | None:
    """One slice out of several along a dimension: q out of (3, B, H, N, D)."""
    name = op_name(node)
    if name == "select":
        source, dim = node.args[0], node.args[1]
    elif getattr(node.target, "__name__", "") == "getitem" and op_name(node.args[0]) in (*_SPLITS, "unbind"):
        splitting = node.args[0]
        source = args_of(splitting)[0]
        dim = argument(splitting, 1 if op_name(splitting) == "unbind" else 2, "dim", 0)  # type: ignore[arg-type]
        name = "select" if op_name(splitting) == "unbind" else "split"
    elif name == "slice":
        return args_of(node)[0], groups
    else:
        return None
    value = tensor_of(source)
    if value is None:
        return None
    if name == "select":
        place = dim % value.ndim
        return source, (*groups[:place], fresh(value.shape[place]), *groups[place:])  # type: ignore[return-value]
    return source, groups  # type: ignore[return-value]


_SPLITS = ("split", "split_with_sizes", "chunk", "tensor_split")


def _pointwise(node: fx.Node, groups: Groups) -> tuple[fx.Node, Groups] | None:
    """Through any operator that keeps the shape, along its first input of that shape."""
    shape = getattr(tensor_of(node), "shape", None)
    if shape is None or node.op != "call_function" or op_name(node) == "softmax":
        return None
    source: Any = next((a for a in node.all_input_nodes if getattr(tensor_of(a), "shape", None) == shape), None)
    return None if source is None else (source, groups)


def is_weight(found: Sequence[Stage]) -> bool:
    """Nothing but a tensor of the model stands behind this operand."""
    return found[-1].node.op == "get_attr"
