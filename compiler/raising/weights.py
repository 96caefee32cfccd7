"""From a softmax forward to the product with the values: what happens to the weights on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ..nodes import args_of, op_name
from ..symbols import Expr, build, const, name
from .axes import Group, Groups, all_leaves, cut, extents, fresh, leaves
from .axes import product as extent_of
from .constants import constant
from .layout import KEEPING, TURNS, VIEWS, ahead, argument, data_users, tensor_of
from .near import Unraised
from .own_sum import divided_by_own_sum
from .products import Product, product_of

DRAWN = "@drawn"  # uniform random numbers, one for each weight

_HANDED_ON = VIEWS | TURNS | KEEPING | {"mean", "sum", "div"}


@dataclass(frozen=True)
class Weighted:
    """sum_j w_ij v_j as a node, with the axes of the values and of the result."""

    product: Product
    values: fx.Node
    value_groups: Groups
    features: Group  # axes that only the values have
    out: Groups
    after: Expr | None


@dataclass
class _Walk:
    node: fx.Node
    groups: Groups
    columns: Group
    sink_at: int | None
    after: Expr = field(default_factory=lambda: name("w"))


def follow_weights(
    node: fx.Node, groups: Groups, columns: Group, sink_at: int | None, table: dict[str, tuple[fx.Node, Groups]]
) -> Weighted:
    """Raise Unraised where the weights are used for anything but one product with values."""
    walk = _Walk(node, groups, columns, sink_at)
    while True:
        if walk.after.text == "w" and walk.sink_at is None and _normalised_again(walk):
            continue
        user = _only_user(walk.node)
        product = product_of(user) or _coming_product(user)
        if product is not None and walk.node in product.operands:
            return _weighted(walk, product)
        if not _step(walk, user, table):
            raise Unraised(user, _why_no_product(user))


def _only_user(node: fx.Node) -> fx.Node:
    users = data_users(node)
    if not users:
        raise Unraised(node, "the weights are not used")
    if len(users) > 1:
        meets = [u for u in users if product_of(u) is None]
        other = (meets or users)[0]
        kind = "returned" if other.op == "output" else f"also used by %{other.name}"
        if _is_returned(other):
            kind += "; need_weights=False or output_attentions=False leaves them out"
        raise Unraised(other, f"the weights are {kind}")
    if users[0].op == "output":
        raise Unraised(node, "the weights are returned: no product with values follows")
    return users[0]


def _normalised_again(walk: _Walk) -> bool:
    found = divided_by_own_sum(walk.node, walk.groups, walk.columns)
    if found is None:
        return False
    walk.node, number = found
    if number != 1:
        walk.after = build("truediv", walk.after, number)
    return True


def _is_returned(node: fx.Node) -> bool:
    """Whether a model gives its weights away, as they are or as their mean over heads."""
    while node.op != "output" and len(node.users) == 1 and op_name(node) in _HANDED_ON:
        node = next(iter(node.users))
    return node.op == "output"


def _coming_product(user: fx.Node) -> Product | None:
    """(w * v).sum(): the product is one node further on."""
    users = data_users(user)
    found = product_of(users[0]) if op_name(user) == "mul" and len(users) == 1 else None
    return found if found is not None and user in found.inside else None


def _why_no_product(user: fx.Node) -> str:
    return f"the weights meet %{user.name} ({op_name(user) or user.op}) before any product with values"


def _step(walk: _Walk, user: fx.Node, table: dict[str, tuple[fx.Node, Groups]]) -> bool:
    """One operator that is no product; false where it is not understood."""
    kind = op_name(user)
    if kind in ("dropout", "dropout_"):
        _drop(walk, user)
    elif kind == "slice" and walk.sink_at is not None and _is_sink_slice(walk, user):
        dim = argument(user, 1, "dim", 0)
        walk.groups = tuple(walk.columns if d == dim % len(walk.groups) else g for d, g in enumerate(walk.groups))
        walk.sink_at = None
    elif kind == "nan_to_num":  # rows that keep nothing: attend gives them 0 by itself
        if argument(user, 1, "nan", 0.0) not in (None, 0, 0.0):
            return False
    elif kind == "masked_fill" and user.args[0] is walk.node and constant(user.args[2]) is not None:
        chosen = _leaf(args_of(user)[1], walk.groups, table)
        walk.after = build("where", chosen, constant(user.args[2]), walk.after)
    elif kind in ("mul", "div") and _scaled(walk, user, table):
        pass
    else:
        moved = ahead(user, walk.groups)
        if moved is None:
            return False
        walk.groups = moved
    walk.node = user
    return True


def _drop(walk: _Walk, user: fx.Node) -> None:
    p, active = float(args_of(user)[1]), bool(args_of(user)[2])
    if active and p > 0.0:
        kept = 1.0 - p
        scaled = build("truediv", walk.after, kept) if kept else const(0.0)
        walk.after = build("where", build("lt", name(DRAWN), kept), scaled, 0.0)


def _is_sink_slice(walk: _Walk, user: fx.Node) -> bool:
    dim = argument(user, 1, "dim", 0) % len(walk.groups)
    before, after = extents(tensor_of(walk.node))[dim], extents(tensor_of(user))[dim]
    start = argument(user, 2, "start") or 0
    expected = 1 if walk.sink_at == 0 else 0
    return start == expected and after == extent_of(walk.columns) and before != after


def _scaled(walk: _Walk, user: fx.Node, table: dict[str, tuple[fx.Node, Groups]]) -> bool:
    other: Any = user.args[1] if user.args[0] is walk.node else user.args[0]
    kind = "truediv" if op_name(user) == "div" else "mul"
    if (kind == "truediv" and user.args[0] is not walk.node) or other is walk.node:
        return False
    if extents(tensor_of(user)) != extents(tensor_of(walk.node)) or argument(user, 2, "rounding_mode"):
        return False
    factor = const(other) if not isinstance(other, fx.Node) else _leaf(other, walk.groups, table)
    walk.after = build(kind, walk.after, factor)
    return True


def _leaf(node: fx.Node, groups: Groups, table: dict[str, tuple[fx.Node, Groups]]) -> Expr:
    number = constant(node)
    if number is not None:
        return const(number)
    shape = extents(tensor_of(node)) if tensor_of(node) is not None else ()
    aligned = tuple(cut(g, s) for s, g in zip(shape, groups[len(groups) - len(shape) :]))
    word = f"@{len(table)}"
    table[word] = (node, aligned)
    return name(word)


def _weighted(walk: _Walk, product: Product) -> Weighted:
    if product.operands[0] is product.operands[1]:
        raise Unraised(product.node, "the weights are multiplied with themselves")
    if product.scale != 1 or product.bias is not None:
        raise Unraised(product.node, "the product with values adds something")
    side = product.operands.index(walk.node)
    labels, others = product.labels[side], product.labels[1 - side]
    values = product.operands[1 - side]
    if walk.sink_at is not None:
        values = _without_zeros(walk, product, labels, others, values)
    sizes = dict(zip(others, extents(tensor_of(values))))
    known = dict(zip(labels, walk.groups))
    features: list[Group] = []
    for label, size in sizes.items():
        if size != 1 and not known.get(label):
            known[label] = fresh(size)
            features.append(known[label])
    summed = all_leaves(tuple(known.get(label, ()) for label in product.summed))
    columns = leaves(walk.columns)
    if set(summed) != set(columns):
        raise Unraised(product.node, _other_axis(walk, product, known))
    if any(size == 1 and extent_of(known[label]) != 1 for label, size in sizes.items() if label in product.summed):
        raise Unraised(product.node, "one value is shared by all keys")
    value_groups = tuple(cut(known.get(label, ()), size) for label, size in sizes.items())
    out = tuple(known.get(label, ()) for label in product.out)
    after = None if walk.after.text == "w" else walk.after
    return Weighted(product, values, value_groups, tuple(a for g in features for a in g), out, after)


def _without_zeros(
    walk: _Walk, product: Product, labels: Sequence[str], others: Sequence[str], values: fx.Node
) -> fx.Node:
    """The values without the zeros that the sink's column is given; the weights' axis is then that of the scores."""
    at = [d for d, g in enumerate(walk.groups) if g and labels[d] in product.summed]
    dim = others.index(labels[at[0]]) if len(at) == 1 and labels[at[0]] in others else None
    sides = [0] * 2 * len(others)
    if dim is not None:
        sides[2 * (len(others) - 1 - dim) + (1 if walk.sink_at else 0)] = 1
    given: list[Any] = list(argument(values, 1, "pad") or ()) if op_name(values) in ("pad", "constant_pad_nd") else []
    zero = not (argument(values, 3 if op_name(values) == "pad" else 2, "value") or 0)
    constant_mode = op_name(values) != "pad" or argument(values, 2, "mode", "constant") == "constant"
    if dim is None or not zero or not constant_mode or given + [0] * (len(sides) - len(given)) != sides:
        raise Unraised(product.node, "the sink's column meets the values")
    walk.groups = tuple(walk.columns if d == at[0] else g for d, g in enumerate(walk.groups))
    return args_of(values)[0]


def _other_axis(walk: _Walk, product: Product, known: dict[str, Group]) -> str:
    order = [leaves(g) for g in walk.groups]
    columns = leaves(walk.columns)
    softmax = next((d for d, g in enumerate(order) if g == columns), "several")
    summed = [d for d, g in enumerate(order) if any(set(leaves(known.get(x, ()))) & set(g) for x in product.summed)]
    where = " and ".join(map(str, summed)) or "another"
    return f"softmax over axis {softmax}, its product with values sums over axis {where}"
