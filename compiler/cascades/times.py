"""How often a tensor must be read from one end to the other: the time at which every value of a cascade is there.

A time n says: as pass n streams; n + 1/2: when pass n is over; 0: before any of it. What reads the streamed tensor at
the end of a pass needs another one.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction

from .einsum import Cascade, Node

HALF = Fraction(1, 2)


@dataclass(frozen=True)
class Times:
    """For a fiber of ranks: when each value is there, in which pass each node reads the streamed tensors."""

    fiber: frozenset[str]
    time: dict[str, Fraction]
    touched: dict[str, int]  # the pass of every node that reads along the fiber
    directions: dict[int, str]  # of the scans, by pass

    @property
    def passes(self) -> int:
        return max(self.touched.values(), default=0)

    @property
    def sweeps(self) -> int:
        return len(set(self.touched.values()))


def times(
    cascade: Cascade,
    tensors: Collection[str],
    fiber: Collection[str],
    soft: Collection[str] = (),
) -> Times:
    """Times for one streamed tensor, or several that are streamed together; soft values are there while they run."""
    ranks = frozenset(fiber)
    time = {o.name: Fraction(int(o.name in tensors)) for o in cascade.operands}
    derived = {t for t in tensors if ranks <= set(cascade.ranks[t])}
    touched: dict[str, int] = {}
    directions: dict[int, str] = {}
    for node in cascade.nodes:
        if node.name in tensors:
            time[node.name] = Fraction(1)
            continue
        latest = max((time[n] for n in node.named), default=Fraction(0))
        if any(n in derived for n in node.named):
            turn = max(1, math.ceil(latest))
            turn = _in_direction(node, ranks, turn, directions)
            touched[node.name] = turn
            time[node.name] = _after_touch(node, ranks, turn)
            if not (node.kind == "global" and set(node.over) & ranks) and ranks <= set(node.ranks):
                derived.add(node.name)
        else:
            done = bool(set(node.over) & ranks) and node.kind in ("reduce", "last") and latest > 0
            time[node.name] = math.floor(latest) + HALF if done else latest
        if node.name in soft:
            time[node.name] = Fraction(math.floor(time[node.name]))
    return Times(ranks, time, touched, directions)


def _after_touch(node: Node, ranks: frozenset[str], turn: int) -> Fraction:
    ended = node.kind in ("last", "global") and bool(set(node.over) & ranks)
    whole = ended or not ranks & set(node.ranks)
    return turn + HALF if whole else Fraction(turn)


def _in_direction(node: Node, ranks: frozenset[str], turn: int, directions: dict[int, str]) -> int:
    """Two scans that run against each other cannot share a pass: the later one takes the next."""
    if node.kind != "scan" or not set(node.over) & ranks:
        return turn
    way = "rev" if node.reverse else "fwd"
    while directions.setdefault(turn, way) != way:
        turn += 1
    return turn


def barriers_of(cascade: Cascade, found: Times) -> tuple[Node, ...]:
    """Nodes that are only there when a pass is over and on which a later reader of the streamed tensor depends."""
    finished = [n for n in cascade.nodes if found.time[n.name].denominator == 2 and _finishes(n, found)]
    return tuple(n for n in finished if _read_later(cascade, n, found))


def _finishes(node: Node, found: Times) -> bool:
    """Whether it is itself what ends a pass: all of the fiber is reduced here, or was before piece by piece."""
    return node.kind in ("reduce", "last", "global") and bool(set(node.over) & found.fiber)


def _read_later(cascade: Cascade, barrier: Node, found: Times) -> bool:
    depending = {barrier.name}
    for node in cascade.nodes:
        if depending & set(node.named):
            depending.add(node.name)
            if node.name in found.touched:
                return True
    return False
