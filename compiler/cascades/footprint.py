"""Live memory of a cascade as a formula: what must be held of each value, whole along the streamed ranks or a tile."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import sympy

from .barriers import Barrier
from .einsum import Cascade, Node
from .times import Times


@dataclass(frozen=True)
class Footprint:
    """Elements held: values that cross from one pass to the next, the state, and the most that a tile holds at once."""

    crossing: tuple[tuple[str, Any], ...]
    state: tuple[tuple[str, Any], ...]
    tile: Any
    streamed: tuple[str, ...]

    @property
    def total(self) -> Any:
        return sympy.expand(sum((size for _, size in (*self.crossing, *self.state)), self.tile))

    @property
    def degree(self) -> int:
        """The power of the streamed ranks' size in it; 0: as much for any number of keys."""
        letters = [size_of(r) for r in self.streamed]
        return int(sympy.Poly(self.total, *letters).total_degree()) if self.total.free_symbols & set(letters) else 0

    def __str__(self) -> str:
        return str(self.total)


def size_of(rank: str) -> Any:
    """The letter for a rank's size: M for m."""
    return sympy.Symbol(rank.upper(), positive=True, integer=True)


def tile_of(rank: str) -> Any:
    return sympy.Symbol(f"{rank.upper()}0", positive=True, integer=True)


def footprint(
    cascade: Cascade, found: Times, running: Collection[Barrier], outer: Collection[str] = ("p",)
) -> Footprint:
    """For an order of passes; `outer` ranks are walked in tiles around the passes.

    What corrections hoist out of a sum (a running barrier's factor) is not made element by element: it needs no room.
    """
    crossing, state = [], []
    tiles: list[Node] = []
    hoisted = _only_hoisted(cascade, found, running)
    for node in cascade.nodes:
        if found.time[node.name] == 0 or node.name in hoisted:
            continue
        along = found.fiber & set(node.ranks)
        if not along:
            if _holds(node, found):
                state.append((node.name, _elements(node, found.fiber, outer, whole=False)))
        elif _crosses(cascade, node, found):
            crossing.append((node.name, _elements(node, found.fiber, outer, whole=True)))
        else:
            tiles.append(node)
            if node.kind == "scan":
                carried = Node(node.name, tuple(r for r in node.ranks if r not in found.fiber), node.text)
                state.append((node.name, _elements(carried, found.fiber, outer, whole=False)))
    streamed = tuple(r for r in cascade.all_ranks if r in found.fiber)
    return Footprint(tuple(crossing), tuple(state), _most(cascade, tiles, found, outer), streamed)


def _elements(node: Node, fiber: Collection[str], outer: Collection[str], whole: bool) -> Any:
    total = sympy.Integer(1)
    for rank in node.ranks:
        if rank in ("b", "h"):
            continue
        tiled = (rank in fiber and not whole) or (rank in outer and rank not in fiber)
        total *= tile_of(rank) if tiled else size_of(rank)
    return total


def _holds(node: Node, found: Times) -> bool:
    """A number that grows as the keys go by: a reduction over them, also one over the sums of tiles."""
    return node.kind in ("reduce", "last") and bool(set(node.over) & found.fiber)


def _crosses(cascade: Cascade, node: Node, found: Times) -> bool:
    """Whether it is made in one pass and read in a later one."""
    made = found.touched.get(node.name, int(found.time[node.name]))
    for other in cascade.nodes:
        if node.name in other.named:
            read = found.touched.get(other.name, int(found.time[other.name]))
            if read > made:
                return True
    return False


def _only_hoisted(cascade: Cascade, found: Times, running: Collection[Barrier]) -> set[str]:
    """Values that differ from one read before only by what a running barrier's correction puts in later."""
    soft = {b.name for b in running if b.soft}
    names = set()
    for node in cascade.nodes:
        if (
            node.kind == "map"
            and node.expr.op == "truediv"
            and node.expr.args[1].text in soft
            and found.fiber & set(node.ranks)
        ):
            names.add(node.name)
    return names


def _most(cascade: Cascade, tiles: list[Node], found: Times, outer: Collection[str]) -> Any:
    """The largest number of elements of each size that are live at once; a map writes over a value read for the last
    time."""
    last: dict[str, int] = {}
    for at, node in enumerate(cascade.nodes):
        for word in node.named:
            last[word] = at
    most: dict[Any, int] = {}
    live: list[Node] = []
    for node in tiles:
        at = cascade.nodes.index(node)
        live = [n for n in live if last.get(n.name, -1) > at or (last.get(n.name) == at and not _over(n, node))]
        live.append(node)
        counts: dict[Any, int] = {}
        for n in live:
            size = _elements(n, found.fiber, outer, whole=False)
            counts[size] = counts.get(size, 0) + 1
        for size, count in counts.items():
            most[size] = max(most.get(size, 0), count)
        live = [n for n in live if last.get(n.name, -1) > at]
    return sum((size * count for size, count in most.items()), sympy.Integer(0))


def _over(value: Node, node: Node) -> bool:
    return node.kind == "map" and value.ranks == node.ranks
