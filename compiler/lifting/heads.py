"""Between a model's own layout of a product's operands and (B, H, N, D): which axes are batch, which are heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..ports import op_name
from ..symbols import Expr, build, name
from .index_paths import SAME, regroup, same_size, shape_of
from .products import Operand
from .reading import Unreadable

aten = torch.ops.aten
B, H = name("b"), name("h")


@dataclass(frozen=True)
class Layout:
    """How the batch axes g0, g1, ... of the product with V are b and h: `values` gives each in terms of b and h."""

    sizes: tuple[Any, ...]  # of the batch axes
    values: tuple[Expr, ...]
    heads: Any

    def settle(self, e: Expr) -> Expr:
        """An expression of g0, g1, ... in terms of b and h; g // H is b and g % H is h where g is b * H + h."""
        split = e.op in ("floordiv", "mod") and len(self.sizes) == 1 and e.args[0].text == "g0"
        if split and e.args[1].op == "const" and same_size(e.args[1].args[0], self.heads):
            return B if e.op == "floordiv" else H
        if e.op == "name":
            return self.values[int(e.args[0][1:])] if e.args[0][0] == "g" else e
        if e.op == "const":
            return e
        args = tuple(self.settle(a) if isinstance(a, Expr) else a for a in e.args)
        return Expr("lookup", args) if e.op == "lookup" else build(e.op, *args)


def layout(sizes: Sequence[Any], used: Sequence[Expr], heads: int | None, *, grouped: bool) -> Layout:
    """Batch axes as b and h: two are (b, h), one is b * heads + h, of three the outer (or, grouped, inner) two join.

    `used` are index expressions found in the chain: g0 // 12 there tells 12 heads.
    """
    count = len(sizes)
    if count == 0:
        return Layout((), (), 1)
    if count == 1:
        known = heads or _divisor(used) or 1
        return Layout(tuple(sizes), (B * known + H if known != 1 else B,), known)
    if count == 2:
        return Layout(tuple(sizes), (B, H), sizes[1])
    if count == 3 and grouped:
        return Layout(tuple(sizes), (B, H // sizes[2], H % sizes[2]), sizes[1] * sizes[2])
    if count == 3 and isinstance(sizes[1], int):
        return Layout(tuple(sizes), (B // sizes[1], B % sizes[1], H), sizes[2])
    raise Unreadable(f"{count} batch axes of sizes {tuple(sizes)}")


def _divisor(used: Sequence[Expr]) -> int | None:
    for e in used:
        for x in e.walk():
            if x.op == "floordiv" and x.args[0].text == "g0" and x.args[1].op == "const":
                return int(x.args[1].args[0])
    return None


_WIDE = frozenset({"linear", "addmm", "select", "add"})


def head_count(node: fx.Node, batch: Any, feature: Any) -> int | None:
    """Heads of an operand (B * H, N, D): from the view that joined them, or the width E = H * D of a projection."""
    seen = 0
    current: Any = node
    while isinstance(current, fx.Node) and seen < 12:
        shape = shape_of(current)
        if len(shape) == 4 and isinstance(shape[1], int) and same_size(_product(shape[:2]), batch):
            return shape[1]
        wide = shape[-1] if len(shape) == 3 and isinstance(feature, int) else None
        if isinstance(wide, int) and wide > feature and wide % feature == 0 and op_name(current) in _WIDE:
            return wide // feature
        sources = [a for a in current.args if isinstance(a, fx.Node)]
        current, seen = (sources[0] if sources else None), seen + 1
    return None


def _product(sizes: Sequence[Any]) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


class Shaping:
    """Adds the moves that bring operands to (B, H, N, D) and the output back, in front of one node."""

    def __init__(self, before: fx.Node) -> None:
        self.graph, self.before = before.graph, before

    def call(self, op: Any, *args: Any) -> fx.Node:
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(op, args)
        values = fx.node.map_arg(args, lambda n: n.meta["val"])
        node.meta = {k: self.before.meta[k] for k in ("nn_module_stack", "stack_trace") if k in self.before.meta}
        fake: Any = next(a for a in pytree.tree_leaves(values) if isinstance(a, torch.Tensor))
        with fake.fake_mode, torch.no_grad():
            node.meta["val"] = op(*values)
        return node

    def size(self, node: fx.Node, axis: int) -> fx.Node:
        """A size of a tensor as a node."""
        with self.graph.inserting_before(self.before):
            found = self.graph.call_function(aten.sym_size.int, (node, axis))
        found.meta = dict(found.meta) | {"val": shape_of(node)[axis]}
        return found

    def rows(self, operand: Operand, where: Sequence[Expr]) -> fx.Node:
        """An operand as (batch..., rows, contracted) -> (B, H, rows, contracted); `where`: its batch axes."""
        node = operand.node
        axes = [a for a in operand.batch if a >= 0]
        order = [*axes, operand.free, operand.contracted]
        if operand.extra >= 0:
            node = self._squeezed(node, operand.extra)
            order = [a - (a > operand.extra) for a in order]
        node = self._permuted(node, order)
        texts = [e.text for e, a in zip(where, operand.batch) if a >= 0]
        return self._to_heads(node, texts, shape_of(node))

    def _squeezed(self, node: fx.Node, axis: int) -> fx.Node:
        rank = len(shape_of(node))
        if op_name(node) == "unsqueeze" and int(node.args[1]) % rank == axis:  # type: ignore[arg-type]
            return node.args[0]  # type: ignore[return-value]
        return self.call(aten.squeeze.dim, node, axis)

    def _permuted(self, node: fx.Node, order: list[int]) -> fx.Node:
        if order == list(range(len(order))):
            return node
        swapped = list(range(len(order)))
        swapped[-2:] = swapped[-2:][::-1]
        if order == swapped:
            if op_name(node) in ("mT", "t") or (
                op_name(node) == "transpose" and {int(a) % len(order) for a in node.args[1:3]} == set(swapped[-2:])  # type: ignore[arg-type]
            ):
                return node.args[0]  # type: ignore[return-value]
            return self.call(aten.transpose.int, node, -2, -1)
        return self.call(aten.permute.default, node, order)

    def _to_heads(self, node: fx.Node, texts: list[str], shape: Sequence[Any]) -> fx.Node:
        plain = [t if not same_size(s, 1) else "1" for t, s in zip(texts, shape)]
        match plain:
            case []:
                return self.call(aten.unsqueeze.default, self.call(aten.unsqueeze.default, node, 0), 0)
            case ["b" | "1", "h" | "1"]:
                return node
            case ["b" | "1", group] if group.startswith("h // "):  # keys of grouped queries
                return node
            case ["h", "b" | "1"]:
                return self.call(aten.transpose.int, node, 0, 1)
            case ["h"]:
                return self.call(aten.unsqueeze.default, node, 0)
            case ["b" | "1"]:
                return self.call(aten.unsqueeze.default, node, 1)
            case [joined] if joined.endswith("+ h") or joined == "h":
                return self._split(node, joined)
            case [_, _, "h" | "1"] if "//" in plain[0] or "%" in plain[1]:
                return self.call(aten.flatten.using_ints, node, 0, 1)
            case ["b" | "1", _, "1"]:
                return self.call(aten.squeeze.dim, node, 2)
            case ["b" | "1", _, _]:
                return self.call(aten.flatten.using_ints, node, 1, 2)
        raise Unreadable(f"batch axes in the order ({', '.join(texts)})")

    def _split(self, node: fx.Node, joined: str) -> fx.Node:
        heads = int(joined.split("*")[1].split("+")[0])
        if op_name(node) in ("view", "reshape", "_unsafe_view"):
            source = node.args[0]
            inner = shape_of(source)
            if (
                len(inner) == 4
                and same_size(inner[1], heads)
                and all(same_size(a, b) for a, b in zip(inner[2:], shape_of(node)[1:]))
            ):
                return source  # type: ignore[return-value]
        return self.call(aten.unflatten.int, node, 0, [-1, heads])

    def back(self, node: fx.Node, layout: Layout, order: Sequence[int], target: Sequence[Any]) -> fx.Node:
        """(B, H, N, Dv) in the layout of the product with V: batch axes regrouped, then `order` of all axes."""
        count = len(layout.sizes)
        if count == 0:
            node = self.call(aten.squeeze.dim, self.call(aten.squeeze.dim, node, 0), 0)
        elif count == 1:
            node = self.call(aten.flatten.using_ints, node, 0, 1)
        elif count == 3 and "h" in layout.values[0].text + layout.values[1].text:
            node = self.call(aten.unflatten.int, node, 1, [layout.sizes[1], layout.sizes[2]])
        elif count == 3:
            node = self.call(aten.unflatten.int, node, 0, [-1, layout.sizes[1]])
        if list(order) != list(range(len(order))):
            node = self.call(aten.permute.default, node, list(order))
        return node


def without_repeats(node: fx.Node, heads: Any) -> fx.Node:
    """Keys before they were repeated for grouped queries: unsqueeze, expand, reshape; or repeat_interleave."""
    current: Any = node
    while isinstance(current, fx.Node) and (op_name(current) in SAME or _whole_slice(current)):
        current = current.args[0]
    if (
        op_name(current) == "repeat_interleave"
        and current.args[2:3] in ((1,), (-3,))
        and isinstance(current.args[1], int)
    ):
        return current.args[0]
    if op_name(current) in ("reshape", "view", "_unsafe_view", "flatten") and len(shape_of(current)) == 4:
        expanded = current.args[0]
        if op_name(expanded) == "expand" and len(shape_of(expanded)) == 5:
            source = expanded.args[0]
            inner = shape_of(source)
            if len(inner) == 5 and same_size(inner[2], 1) and _joins_heads(expanded, current):
                while isinstance(source, fx.Node) and _whole_slice(source):
                    source = source.args[0]
                if op_name(source) == "unsqueeze" and source.args[1] in (2, -3):
                    return _through_slices(source.args[0])
    return node


def _through_slices(node: Any) -> fx.Node:
    while isinstance(node, fx.Node) and _whole_slice(node):
        node = node.args[0]
    return node


def _whole_slice(node: Any) -> bool:
    return op_name(node) == "slice" and all(same_size(a, b) for a, b in zip(shape_of(node), shape_of(node.args[0])))


def _joins_heads(expanded: fx.Node, joined: fx.Node) -> bool:
    index = regroup(shape_of(expanded), shape_of(joined), tuple(name(n) for n in "bhij"))
    group = shape_of(expanded)[2]
    return index is not None and [e.text for e in index] == ["b", f"h // {group}", f"h % {group}", "i", "j"]
