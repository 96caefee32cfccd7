"""RMS norms spelled out: w * (x * rsqrt(mean(x^2) + eps)), found from their rsqrt outward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from ..nodes import args_of, op_name


@dataclass(frozen=True)
class Spelled:
    """The node that gives the normed value is the key under which this stands."""

    x: fx.Node
    weight: fx.Node | None
    neutral: float
    inside: frozenset[fx.Node]  # nodes between, which are no operations of their own


def rms_norms(graph: fx.Graph) -> dict[fx.Node, Spelled]:
    """Every norm spelled out, by the node that gives its result."""
    found = {}
    for node in graph.nodes:
        if op_name(node) == "rsqrt":
            one = _around(node)
            if one is not None:
                found[one[0]] = one[1]
    return found


def _around(rsqrt: fx.Node) -> tuple[fx.Node, Spelled] | None:
    plus = rsqrt.args[0]
    mean: Any = args_of(plus)[0] if op_name(plus) == "add" else None
    if op_name(mean) != "mean" or list(mean.args[1]) != [-1] or not mean.args[2:]:
        return None
    square: Any = mean.args[0]
    twice = op_name(square) == "mul" and square.args[0] is square.args[1]
    if not twice and not (op_name(square) == "pow" and square.args[1] == 2):
        return None
    x: fx.Node = square.args[0]
    users = [u for u in rsqrt.users if op_name(u) == "mul" and x in u.args]
    if len(users) != 1 or len(rsqrt.users) != 1:
        return None
    end, inside = users[0], [square, mean, plus, rsqrt]
    while len(end.users) == 1 and op_name(next(iter(end.users))) in ("to", "_to_copy"):
        inside.append(end)
        end = next(iter(end.users))
    scaled = _scaled(end)
    if scaled is None:
        return end, Spelled(x, None, 1.0, frozenset(inside))
    product, weight, neutral, between = scaled
    return product, Spelled(x, weight, neutral, frozenset([*inside, end, *between]))


def _scaled(normed: fx.Node) -> tuple[fx.Node, fx.Node, float, list[fx.Node]] | None:
    """The product with a weight, or with 1 + weight."""
    user = next(iter(normed.users)) if len(normed.users) == 1 else None
    if user is None or op_name(user) != "mul":
        return None
    other: Any = user.args[1] if user.args[0] is normed else user.args[0]
    if _vector(other):
        return user, other, 1.0, []
    if op_name(other) == "add" and 1.0 in other.args:
        held: Any = other.args[0]
        between = [other]
        while op_name(held) in ("to", "_to_copy"):
            between.append(held)
            held = held.args[0]
        if _vector(held):
            return user, held, 0.0, between
    return None


def _vector(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr" and node.meta["val"].ndim == 1
