"""New nodes with their fake values: operands brought into (B, H, N, D), tables and sizes that an attend needs."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from ..nodes import op_name
from ..symbols import Expr, build, const, name
from .axes import Axis, Group, Groups, all_leaves, extent, extents, leaves, product, same
from .layout import SIZES, tensor_of
from .near import Unraised

aten = torch.ops.aten
INDICES = ("b", "h", "i", "j")


class Builder:
    """Adds nodes in front of one node, in its module's name."""

    def __init__(self, anchor: fx.Node, sized: Sequence[fx.Node]) -> None:
        self.anchor, self.graph = anchor, anchor.graph
        self.sized = [n for n in sized if tensor_of(n) is not None]  # tensors whose sizes may be asked for
        self.fake_mode = getattr(tensor_of(anchor), "fake_mode", None)
        self.sizes: dict[Any, fx.Node] = {}

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        with self.graph.inserting_before(self.anchor):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = {k: v for k, v in self.anchor.meta.items() if k in ("nn_module_stack", "stack_trace")}
        values, options = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.fake_mode or contextlib.nullcontext():
            node.meta["val"] = target(*values, **options)
        return node

    def size(self, group: Group) -> int | fx.Node:
        """The size of a group as an argument."""
        total: int | fx.Node = 1
        for axis in leaves(group):
            one = self._size(axis.size)
            if isinstance(total, int) and isinstance(one, int):
                total = total * one
            else:
                total = one if total == 1 else self.call(operator.mul, total, one)
        return total

    def _size(self, size: Any) -> int | fx.Node:
        if isinstance(size, int):
            return size
        if size not in self.sizes:
            self.sizes[size] = self._measured(size)
        return self.sizes[size]

    def _measured(self, size: Any) -> fx.Node:
        for tensor in self.sized:
            for dim, found in enumerate(extents(tensor_of(tensor))):
                if found == size:
                    known = [
                        u for u in tensor.users if op_name(u) in SIZES and u.args[1:] == (dim,) and u < self.anchor
                    ]
                    return known[0] if known else self.call(aten.sym_size.int, tensor, dim)
        for tensor in self.sized:
            for dim, found in enumerate(extents(tensor_of(tensor))):
                factor = found / size if not isinstance(found, int) else None
                if factor is not None and getattr(factor, "is_Integer", False):
                    return self.call(operator.floordiv, self.call(aten.sym_size.int, tensor, dim), int(factor))
        raise Unraised(self.anchor, f"no tensor around it has the size {size}")

    def shaped_size(self, size: Any) -> int | fx.Node:
        """The size of one dimension as an argument."""
        return self._size(extent(size))

    def shaped(self, node: fx.Node, groups: Groups) -> fx.Node:
        if extents(tensor_of(node)) == tuple(product(g) for g in groups):
            return node
        symbolic = [g for g in groups if not isinstance(product(g), int)]
        sizes = [-1 if len(symbolic) == 1 and g is symbolic[0] else self.size(g) for g in groups]
        return self.call(aten.reshape.default, node, sizes)

    def arranged(self, node: fx.Node, groups: Groups, wanted: Groups) -> fx.Node:
        """The tensor with dimensions as wanted: views and permutations, copies along axes that it does not have."""
        if same(groups, wanted):
            return node
        order = list(all_leaves(wanted))
        have = all_leaves(groups)
        if set(have) - set(order):
            raise Unraised(node, f"%{node.name} has an axis that the site has not")
        units = _units(groups, wanted)
        flat = tuple(units)
        if not same(tuple(g for g in groups), flat):
            node = self.shaped(node, flat)
        turned = sorted(range(len(units)), key=lambda k: order.index(units[k][0]))
        if turned != list(range(len(units))):
            node = self.call(aten.permute.default, node, turned)
        units = [units[k] for k in turned]
        if len(have) < len(order):
            node = self._copied(node, units, wanted)
        return self.shaped(node, wanted)

    def _copied(self, node: fx.Node, units: Sequence[Group], wanted: Groups) -> fx.Node:
        present = {u[0]: u for u in units}
        inside = {a for u in units for a in u}
        dims: list[tuple[Group, bool]] = []
        for group in wanted:
            for axis in leaves(group):
                if axis in present:
                    dims.append((present[axis], True))
                elif axis not in inside:
                    dims.append(((axis,), False))
        node = self.shaped(node, tuple(g if there else () for g, there in dims))
        return self.call(aten.expand.default, node, [-1 if there else self.size(g) for g, there in dims])

    def table(self, node: Any, groups: Groups, index: dict[str, Group]) -> tuple[fx.Node, list[Expr]]:
        """A tensor of the score as a table and the indices to look it up with."""
        value = tensor_of(node)
        if value is None:
            kind = torch.float32 if not isinstance(node.meta["val"], int | torch.SymInt) else torch.int64
            node, groups = self.call(aten.scalar_tensor.default, node, dtype=kind), ()
            value = tensor_of(node)
        if value.ndim == 0:
            return self.call(aten.reshape.default, node, [1]), [const(0)]
        runs = {n: _run(n, index[n], groups) for n in INDICES}
        if all(_place(g, runs) is not None for g in groups):
            return node, [runs[place][1] if (place := _place(g, runs)) else const(0) for g in groups]
        wanted = tuple(runs[n][0] for n in INDICES)
        return self.arranged(node, groups, wanted), [runs[n][1] if runs[n][0] else const(0) for n in INDICES]


def _units(groups: Groups, wanted: Groups) -> list[Group]:
    """Axes that stay together on the way from one layout to the other."""
    following: dict[Axis, Axis] = {}
    for group in wanted:
        axes = leaves(group)
        following.update(pairwise(axes))
    units: list[Group] = []
    for group in groups:
        unit: list[Axis] = []
        for axis in leaves(group):
            if unit and following.get(unit[-1]) is axis:
                unit.append(axis)
                continue
            if unit:
                units.append(tuple(unit))
            unit = [axis]
        if unit:
            units.append(tuple(unit))
    return units


def _run(word: str, whole: Group, groups: Groups) -> tuple[Group, Expr]:
    """Which axes of an index a table has, as one run, and the index within it; the whole index where that is no run."""
    axes, there = leaves(whole), set(all_leaves(groups))
    picked = [k for k, a in enumerate(axes) if a in there]
    if not picked:
        return (), const(0)
    first, last = picked[0], picked[-1]
    run, inner = axes[first : last + 1], product(axes[last + 1 :])
    sizes_known = isinstance(inner, int) and (first == 0 or isinstance(product(run), int))
    if len(run) == len(axes) or len(run) != len(picked) or not sizes_known:
        return axes, name(word)
    place = build("floordiv", name(word), inner)
    return run, place if first == 0 else build("mod", place, product(run))


def _place(group: Group, runs: dict[str, tuple[Group, Expr]]) -> str | None:
    """The index that a dimension is looked up with; "" for a dimension of size 1, None where it is not one run."""
    axes = leaves(group)
    if not axes:
        return ""
    return next((word for word, (run, _) in runs.items() if run == axes), None)
