"""Masks by their values: what cannot be read is computed at several sizes and compared with a family of formulas.

A family member must agree with the mask at every size and for all made-up data. Masks that depend on a two-dimensional
input are taken apart: mask(data) = mask(all ones) & what the data allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..nodes import draws
from ..symbol_eval import evaluate
from ..symbols import TRUE, Expr, build, const, name
from .evaluation import ENOUGH, LOW, STYLES, Sizes, Unknown, choose_sizes, compute, invent, needed
from .reading import Index, Reader, leaf_name

ROW, COLUMN, BATCH = name("i"), name("j"), name("b")  # stand for the index asked for
WIDEST = 600  # a size worth computing to see a constant of the mask at work


class Families:
    """Recognises whole tensors over queries and keys, as one site sees them."""

    def __init__(self, graph_module: fx.GraphModule, q: fx.Node, k: fx.Node) -> None:
        self.graph_module, self.q, self.k = graph_module, q, k
        self.beyond = 0
        self.fill = -math.inf  # of the additive mask looked at last

    def recognise(self, nodes: Sequence[fx.Node], reader: Reader) -> dict[fx.Node, Callable[[Index], Expr]]:
        """Formulas for those of the nodes that agree with one."""
        found = {}
        for node in nodes:
            formula = None if reader.is_learned(node) else self._formula(node)
            if formula is not None:
                found[node] = _placed(node, formula, self.fill)
        return found

    def _formula(self, node: fx.Node) -> Expr | None:
        value = node.meta["val"]
        behind = needed([node], {})
        data = [n for n in behind if n.op == "placeholder" and isinstance(n.meta.get("val"), Tensor)]
        data = [n for n in data if any(_flows(n, b) for b in behind if b.users.keys() & {node} or b is node)]
        if value.ndim < 2 or any(n.meta["val"].ndim != 2 or n.meta["val"].is_floating_point() for n in data):
            return None
        if any(draws(n) for n in behind):
            return None
        numbers = [a for n in behind for a in n.args if isinstance(a, int) and 1 < a < WIDEST]
        wide, self.fill = 2 * max(numbers, default=0) + 3, -math.inf
        self.beyond = max(self.beyond, wide)
        fills: set[float] = set()
        try:
            every = self._masks(node, behind, data, fills, wide)
        except Unknown:
            return None
        if len(fills) > 1:
            return None  # in a row that keeps nothing the highest counts
        self.fill = next(iter(fills), -math.inf)
        structure = _structure([(plain, sizes) for plain, _, sizes in every if plain is not None])
        if structure is None:
            return None
        self.beyond = max(self.beyond, 2 * _largest_number(structure) + 3)  # where a bound shows that it is one
        if not data:
            return structure
        return next((c for c in _with_data(structure, data) if all(self._agrees(c, t, s) for _, t, s in every)), None)

    def _masks(
        self, node: fx.Node, behind: list[fx.Node], data: list[fx.Node], fills: set[float], wide: int
    ) -> list[tuple[Any, Any, Sizes]]:
        """At each size: the mask for data of ones, and pairs of (data, mask) in every style."""
        values = [n.meta.get("val") for n in behind] + [self.q.meta["val"], self.k.meta["val"]]
        found = []
        for sizes in choose_sizes(values, node.meta["val"].shape, wide):
            ones = {n: torch.ones(sizes.shape(n.meta["val"]), dtype=n.meta["val"].dtype) for n in data}
            try:
                plain = _as_mask(compute([node], sizes, dict(ones), self.graph_module, 0)[0], fills)
            except Unknown:
                continue
            pairs = []
            for style in range(len(STYLES)) if data else ():
                given = {n: invent(n.meta["val"], sizes, style) for n in data}
                pairs.append((given, _as_mask(compute([node], sizes, dict(given), self.graph_module, style)[0], fills)))
            found.append((plain, pairs, sizes))
        if len(found) < (ENOUGH if len(sizes.values) else 1):
            raise Unknown("no sizes at which it can be computed")
        if any(p is None for p, _, _ in found) or any(m is None for _, pairs, _ in found for _, m in pairs):
            raise Unknown("it is no mask")
        return found

    def _agrees(self, formula: Expr, pairs: list[tuple[dict[fx.Node, Tensor], Tensor]], sizes: Sizes) -> bool:
        return all(torch.equal(_values(formula, mask, {leaf_name(n): t for n, t in given.items()}), mask)
                   for given, mask in pairs)  # fmt: skip


def _placed(node: fx.Node, formula: Expr, fill: float) -> Callable[[Index], Expr]:
    """The formula at an index of the node; of an additive mask, 0 or what it fills in."""
    additive = node.meta["val"].dtype.is_floating_point

    def at(index: Index) -> Expr:
        e = formula.replace({"i": index[-2], "j": index[-1], "b": index[0] if len(index) > 2 else const(0)})
        return build("where", e, const(0.0), const(fill)) if additive else e

    return at


def _flows(data: fx.Node, node: fx.Node) -> bool:
    """Whether the values of an input reach the node, not only its sizes."""
    todo, seen = [node], set()
    while todo:
        n = todo.pop()
        if n is data:
            return True
        if n in seen or not isinstance(n.meta.get("val"), Tensor | list | tuple):
            continue
        seen.add(n)
        todo.extend(n.all_input_nodes)
    return False


def _as_mask(value: Tensor, fills: set[float]) -> Tensor | None:
    """True where kept; None for a tensor that is neither boolean nor made of 0 and very low values, told in `fills`."""
    if value.dtype == torch.bool:
        return value
    if not value.dtype.is_floating_point or not bool(((value == 0) | (value < 2 * LOW)).all()):
        return None
    fills |= set(value[value != 0].unique().tolist())
    return value == 0


def _structure(masks: list[tuple[Tensor, Sizes]]) -> Expr | None:
    """The formula of i and j that all of the masks obey."""
    largest = max((m for m, _ in masks), key=lambda m: m.shape[-1] * m.shape[-2])
    for formula in _candidates(largest.reshape(-1, *largest.shape[-2:])[0]):
        if all(torch.equal(_values(formula, m, {}), m) for m, _ in masks):
            return formula
    return None


def _largest_number(formula: Expr) -> int:
    return max((abs(e.args[0]) for e in formula.walk() if e.op == "const"), default=0)


def _candidates(plain: Tensor) -> Iterator[Expr]:
    """Formulas with the constants that the values suggest."""
    rows, columns = plain.shape
    yield TRUE
    for base in (ROW, *([ROW + (name("M") - name("N"))] if rows != columns else [])):
        gap = 0 if base is ROW else columns - rows
        offsets = torch.arange(columns)[None, :] - torch.arange(rows)[:, None] - gap
        if bool(plain.any()):
            low, high = int(offsets[plain].min()), int(offsets[plain].max())
            below, above = base + low <= COLUMN, base + high >= COLUMN
            yield above
            yield below
            yield below & above
        causal = base >= COLUMN
        first = int(plain[0].long().sum())
        for count in {first, int(plain[:, 0].long().sum())} - {0}:
            block = build("floordiv", ROW, const(count)), build("floordiv", COLUMN, const(count))
            yield block[0] == block[1]
            yield (block[0] == block[1]) & causal
            yield block[1] <= block[0]
        yield causal | (first > COLUMN)


def _with_data(structure: Expr, data: list[fx.Node]) -> Iterator[Expr]:
    """What inputs of shape (batch, length) may add: keys or queries left out, or documents kept apart."""
    additions: list[Expr] = [TRUE]
    for node in data:
        row = Expr("lookup", (leaf_name(node), BATCH, ROW))
        column = Expr("lookup", (leaf_name(node), BATCH, COLUMN))
        ways = [TRUE, column != 0, row == column, (row != 0) & (column != 0), (row == column) & (column != 0), row != 0]
        additions = [a & w for a in additions for w in ways]
    for addition in additions:
        yield structure & addition


def _values(formula: Expr, like: Tensor, tables: dict[str, Tensor]) -> Tensor:
    rows, columns = like.shape[-2:]
    lead = like.shape[0] if like.ndim > 2 else 1
    shape = [1] * like.ndim
    names: dict[str, Any] = {
        "i": torch.arange(rows).view(*shape[:-2], rows, 1) if like.ndim >= 2 else 0,
        "j": torch.arange(columns).view(*shape[:-1], columns),
        "b": torch.arange(lead).view(-1, *shape[1:]) if like.ndim > 2 else torch.zeros(shape, dtype=torch.long),
        "N": rows,
        "M": columns,
    }
    try:
        value = evaluate(formula, names, tables)
    except (RuntimeError, KeyError):
        return torch.empty(0)
    value = value if isinstance(value, Tensor) else torch.tensor(bool(value))
    return value.expand(like.shape) if value.ndim <= like.ndim else torch.empty(0)
