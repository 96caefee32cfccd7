"""What a cascade's equations imply: passes over each input, barriers, the fewest passes, live memory, its category."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from .barriers import Barrier, barrier
from .change import POWER
from .einsum import Cascade, Node, Operand
from .footprint import Footprint, footprint
from .times import Times, barriers_of, times


@dataclass(frozen=True)
class Reading:
    """How one tensor is read along one fiber: passes as written, barriers, passes once the soft ones run along."""

    tensor: str
    fiber: tuple[str, ...]
    passes: int
    least: int
    barriers: tuple[Barrier, ...]
    directions: tuple[str, ...] = ()  # of scans along the fiber

    @property
    def soft(self) -> tuple[str, ...]:
        return tuple(b.name for b in self.barriers if b.soft)

    @property
    def hard(self) -> tuple[str, ...]:
        return tuple(b.name for b in self.barriers if not b.soft)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of correction that bring it from the passes as written to the fewest."""
        found = {kind for b in self.barriers for kind in _kinds(b)} | {f"scan {way}" for way in self.directions}
        return tuple(kind for kind in _ORDER if kind in found) or ("none",)

    def __str__(self) -> str:
        along = "".join(self.fiber)
        change = f"{self.passes}" if self.passes == self.least else f"{self.passes} -> {self.least}"
        return f"{self.tensor} over {along}: {change} ({', '.join(self.kinds)})"


_ORDER = ("hoist", "running", "poly", "scan fwd", "scan rev", "hard")


def _kinds(b: Barrier) -> set[str]:
    """hoist: a factor that waits until the sum is over; running: one that is put right as it goes."""
    if not b.soft:
        return {"hard"}
    found = set()
    for _, t in b.changes:
        if t.kind == "P":
            found.add("poly")
        elif t.kind in ("S", "A"):
            found.add("running" if t.kind == "A" or any(g.startswith(POWER) for g, _ in t.of) else "hoist")
    return found


def read_over(
    cascade: Cascade, tensors: Collection[str], fiber: Collection[str], *, poly: bool = True
) -> tuple[Times, Times, tuple[Barrier, ...]]:
    """Times as written, times with every soft barrier running along, and the barriers; tensors streamed together."""
    written = times(cascade, tensors, fiber)
    found = tuple(barrier(cascade, node, written, poly=poly) for node in barriers_of(cascade, written))
    return written, times(cascade, tensors, fiber, soft={b.name for b in found if b.soft}), found


def reading(cascade: Cascade, tensor: str, fiber: Collection[str], *, poly: bool = True) -> Reading:
    written, least, found = read_over(cascade, (tensor,), fiber, poly=poly)
    ways = tuple(dict.fromkeys(written.directions.values()))
    return Reading(tensor, tuple(fiber), written.passes, least.passes, found, ways)


@dataclass(frozen=True)
class Verdict:
    """All that is known of a cascade from its equations, for the fiber of its keys and that of its queries."""

    cascade: Cascade
    keys: tuple[str, ...]
    queries: tuple[str, ...]
    readings: tuple[Reading, ...]
    passes: int
    least: int
    sweeps: int
    barriers: tuple[Barrier, ...]
    category: str
    written: Footprint
    running: Footprint

    def reading_of(self, tensor: str, fiber: str = "") -> Reading:
        return next(r for r in self.readings if r.tensor == tensor and (not fiber or "".join(r.fiber) == fiber))

    @property
    def corrections(self) -> tuple[tuple[str, str, str], ...]:
        """(barrier, reduction, factor) of everything that a running barrier puts right."""
        return tuple((b.name, n, c) for b in self.barriers if b.soft for n, c in b.corrections)

    @property
    def unsafe(self) -> bool:
        """Whether an exponential is summed along the keys without anything that bounds it."""
        return any(
            e.op in ("exp", "exp2") and not any(self._bounds(n) for n in e.names)
            for node in self.cascade.nodes
            if set(self.keys) & set(node.ranks)
            for e in node.expr.walk()
        )

    def _bounds(self, word: str) -> bool:
        node = self.cascade.by_name.get(word)
        return node is not None and (
            node.monoid in ("max", "min") or node.kind == "scan" or any(map(self._bounds, node.named))
        )


def analyse(
    cascade: Cascade, keys: Collection[str] = ("m",), queries: Collection[str] = ("p",), *, poly: bool = True
) -> Verdict:
    """The verdict for keys along some ranks and queries along others (the same ones where they are one sequence)."""
    keys, queries = tuple(keys), tuple(queries)
    fibers = dict.fromkeys((keys, queries))
    readings = tuple(
        reading(cascade, o.name, fiber, poly=poly)
        for fiber in fibers
        for o in cascade.operands
        if fiber and set(fiber) <= set(o.ranks) and used(cascade, o)
    )
    along = [o.name for o in cascade.operands if set(keys) <= set(o.ranks)]
    written, least, found = read_over(cascade, along, keys, poly=poly)
    own = [r for r in readings if r.fiber == keys]
    return Verdict(
        cascade,
        keys,
        queries,
        readings,
        passes=max((r.passes for r in own), default=0),
        least=max((r.least for r in own), default=0),
        sweeps=written.sweeps,
        barriers=found,
        category=category(cascade, keys, queries, least, found),
        written=footprint(cascade, written, ()),
        running=footprint(cascade, least, found),
    )


def used(cascade: Cascade, operand: Operand) -> bool:
    return any(operand.name in node.named for node in cascade.nodes)


def category(
    cascade: Cascade, keys: Collection[str], queries: Collection[str], least: Times, found: Collection[Barrier]
) -> str:
    """factored: no tensor knows both a query and a key; compressed: none does, and a normalised or nonlinear stage
    stands between them; else as many passes over a product of both."""
    if not queries:
        return "a reduction"
    one_sequence = tuple(keys) == tuple(queries)
    both = [n for n in cascade.nodes if set(keys) <= set(n.ranks) and set(queries) <= set(n.ranks)]
    scans = [n for n in cascade.nodes if n.kind == "scan" and set(n.over) & set(keys)]
    if not one_sequence and both:
        return f"{least.passes}-pass quadratic"
    if found or _bent(cascade, keys, queries):
        return "compressed"
    return "factored, recurrent" if one_sequence and scans else "factored"


def _bent(cascade: Cascade, keys: Collection[str], queries: Collection[str]) -> bool:
    """Whether what was summed over the keys meets the queries other than in sums of products and one division."""
    state = {n.name for n in cascade.nodes if set(n.over) & set(keys) and n.kind == "reduce"}
    for node in cascade.nodes:
        if state & set(node.named):
            if set(queries) & set(node.ranks) and any(e.op not in _LINEAR for e in node.expr.walk()):
                return True
            state.add(node.name)
    return False


_LINEAR = frozenset({"name", "const", "mul", "add", "truediv", "lookup"})


def state_of(cascade: Cascade, keys: Collection[str]) -> tuple[Node, ...]:
    """What stands for all keys seen so far: reductions over them, and what scans along them have come to."""
    return tuple(n for n in cascade.nodes if set(n.over) & set(keys) and n.kind in ("reduce", "scan"))
