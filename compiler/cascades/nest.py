"""The loop nest that an analysis allows: as many loops over tiles of keys as there are passes, run as it stands.

A state is what the cascade comes to on some of the keys alone. Two states become one by the corrections: each sum is
multiplied by what the barriers it was made with have moved by. Nothing here knows which cascade it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..refusal import Refused
from ..symbol_text import parse
from ..symbols import Expr
from .analysis import read_over
from .barriers import correction, types_when_replaced
from .change import POWER, Change
from .coefficients import Coefficient, coefficients
from .einsum import Cascade, Node
from .running import NEUTRAL, Values, aligned, combine, compute, in_space, scanned
from .times import Times

State = dict[str, Tensor]
Tree = Any  # the number of a tile, or a pair of trees


@dataclass(frozen=True)
class Sum:
    """One reduction along the streamed rank: the pass that makes it, how it changes, its terms as a polynomial."""

    node: Node
    turn: int
    change: Change
    terms: tuple[Coefficient, ...] = ()


@dataclass(frozen=True)
class LoopNest:
    """The loops over one rank; `run` folds tiles in order, or merges their states along any tree."""

    cascade: Cascade
    rank: str
    poly: bool = True

    @cached_property
    def times(self) -> Times:
        along = [o.name for o in self.cascade.operands if self.rank in o.ranks]
        return read_over(self.cascade, along, (self.rank,), poly=self.poly)[1]

    @cached_property
    def passes(self) -> int:
        return max(self.turn.values(), default=1)

    @cached_property
    def turn(self) -> dict[str, int]:
        """The pass in which each node is made."""
        return {
            n.name: self.times.touched.get(n.name, max(1, math.floor(self.times.time[n.name])))
            for n in self.cascade.nodes
        }

    @cached_property
    def sums(self) -> dict[str, Sum]:
        return {s.node.name: s for turn in range(1, self.passes + 1) for s in self._sums(turn)}

    @property
    def scans(self) -> tuple[Node, ...]:
        return tuple(n for n in self.cascade.nodes if n.kind == "scan" and self.rank in n.over)

    @property
    def reverse(self) -> bool:
        return any(n.reverse for n in self.scans)

    @cached_property
    def in_order(self) -> str:
        """Why tiles can only follow each other, or "" where their states merge along any tree."""
        outputs = [n for n in self.cascade.outputs if self.rank in self.cascade.ranks[n]]
        if any(n.monoid != "sum" or n.decay or n.init for n in self.scans) or any(n.kind == "last" for n in self._own):
            return "a scan that is no plain sum goes from tile to tile"
        if self.scans and outputs:
            return f"{outputs[0]} follows a scan element by element"
        wrong = [s.node.name for s in self.sums.values() if s.change.kind == "O"]
        return f"{wrong[0]} follows a scan in a way that nothing corrects" if wrong else ""

    @property
    def commutes(self) -> bool:
        """Whether states may also be merged in any order."""
        return not self.scans and not self.in_order

    @cached_property
    def _own(self) -> tuple[Node, ...]:
        return self.cascade.needed(self.cascade.outputs)

    def _is_sum(self, node: Node) -> bool:
        return node.kind == "reduce" and self.rank in node.over

    def _sums(self, turn: int) -> list[Sum]:
        running = {n.name for n in self.cascade.nodes if self._is_sum(n) and self.turn[n.name] == turn}
        types = types_when_replaced(
            self.cascade, running, frozenset((self.rank,)), independent=True, carried={n.name for n in self.scans}
        )
        found = []
        for node in self.cascade.nodes:
            if node.name in running:
                change = types[f"{node.name}'"]
                terms: tuple[Coefficient, ...] = ()
                if change.kind == "P" and node.monoid == "sum":
                    terms = coefficients(self.cascade, node, self._runs(types), self._free(node))
                found.append(Sum(node, turn, change, terms))
        return found

    def _free(self, node: Node) -> Callable[[Expr], bool]:
        return lambda e: self.rank not in self.cascade.ranks_of(e, node)

    @staticmethod
    def _runs(types: Mapping[str, Change]) -> Callable[[Expr], bool]:
        return lambda e: any(types.get(n, Change("I")).kind != "I" for n in e.names)

    # --- running it ---------------------------------------------------------------------------------------------------

    def run(
        self,
        tensors: Mapping[str, Tensor],
        tables: Mapping[str, Tensor] = {},
        *,
        tile: int | Sequence[int] = 1,
        tree: Tree = None,
    ) -> dict[str, Tensor]:
        """The outputs, from tiles of one size or of the sizes given; `tree` merges states that know nothing of each
        other, without it tiles follow each other."""
        if tree is not None and self.in_order:
            raise Refused("a tree of states", where="loop nest", fits=f"tiles in order: {self.in_order}")
        whole = next(t.shape[o.ranks.index(self.rank)] for o in self.cascade.operands if self.rank in o.ranks
                     for t in (tensors[o.name],))  # fmt: skip
        cuts = _cuts(whole, tile)
        known: State = {}
        rows: dict[int, dict[str, Tensor]] = {k: {} for k in range(len(cuts))}
        for turn in range(1, self.passes + 1):
            tiles = [self._values(tensors, tables, cut, whole) for cut in cuts]
            if tree is None:
                state = self._fold(tiles, turn, known, rows)
            else:
                states = [self._tile(values, turn, known, {}, rows[k])[0] for k, values in enumerate(tiles)]
                state = self._merged(tree, states, tiles[0], turn, known)
            known = self._settled(state, tiles[0], turn, known)
        return {name: self._output(name, tensors, known, rows) for name in self.cascade.outputs}

    def _values(self, tensors: Mapping[str, Tensor], tables: Mapping[str, Tensor], cut: range, whole: int) -> Values:
        sliced = {
            o.name: tensors[o.name].narrow(o.ranks.index(self.rank), cut.start, len(cut))
            if self.rank in o.ranks
            else tensors[o.name]
            for o in self.cascade.operands
        }
        return Values(self.cascade, sliced, tables, {self.rank: cut.start}, {self.rank: whole})

    def _fold(self, tiles: list[Values], turn: int, known: State, rows: dict[int, dict[str, Tensor]]) -> State:
        order = range(len(tiles))
        carry: State = {}
        total: State | None = None
        for k in reversed(order) if self.reverse else order:
            state, carry = self._tile(tiles[k], turn, known, carry, rows[k])
            total = state if total is None else self.merge(total, state, tiles[k], turn, known, apart=False)
        assert total is not None
        return total

    def _merged(self, tree: Tree, states: list[State], values: Values, turn: int, known: State) -> State:
        if isinstance(tree, int):
            return states[tree]
        first, second = (self._merged(part, states, values, turn, known) for part in tree)
        return self.merge(first, second, values, turn, known)

    def _tile(
        self, values: Values, turn: int, known: State, carry: State, rows: dict[str, Tensor]
    ) -> tuple[State, State]:
        """The state of one tile, what its scans have come to; values along the rank that are asked for go to rows."""
        here = values.with_tensors(dict(values.tensors))
        state: State = {}
        ends: State = {}
        for node in self._own:
            if self.turn[node.name] > turn or any(n not in here.tensors for n in node.named):
                continue
            if self._is_sum(node) and self.turn[node.name] < turn:
                here.tensors[node.name] = known[node.name]
            elif self._is_sum(node):
                for key, part in _parts(self.sums[node.name]):
                    state[key] = compute(part, here)
                here.tensors[node.name] = compute(node, here)
            elif node.kind == "scan" and self.rank in node.over:
                here.tensors[node.name], ends[node.name] = scanned(node, here, carry.get(node.name))
                if not self.in_order:
                    state[f"{node.name}_total"] = ends[node.name]
            elif node.kind == "last" and self.rank in node.over:
                state[node.name] = here.tensors[node.name] = compute(node, here)
            else:
                here.tensors[node.name] = compute(node, here)
            if node.name in self.cascade.outputs and self.rank in node.ranks and self.turn[node.name] == turn:
                rows[node.name] = here.tensors[node.name]
        return state, ends

    def merge(self, first: State, second: State, values: Values, turn: int, known: State, apart: bool = True) -> State:
        """One state of two; `apart`: the second was made without knowing what its scans had come to before."""
        olds = [self._settled(state, values, turn, known) for state in (first, second)]
        carries: list[State] = [{}, {}]
        new: State = {}
        for node in self.scans:
            key = f"{node.name}_total"
            if apart and key in first and key in second:
                carries[1][f"{node.name}_carry"] = first[key]
                new[key] = first[key] + second[key]
            elif key in second:
                new[key] = second[key]
        for node in self._own:
            if node.kind == "last" and node.name in second:
                new[node.name] = second[node.name]
            if not self._is_sum(node) or self.turn[node.name] != turn:
                continue
            now = self._settled(new, values, turn, known)
            own = self.sums[node.name]
            for key, part in _parts(own):
                moved = [
                    self._moved(own, state[key], old, now, carried, values) if not own.terms else state[key]
                    for state, old, carried in zip((first, second), olds, carries)
                ]
                new[key] = combine(part.monoid, *moved)
        return new

    def _settled(self, state: State, values: Values, turn: int, known: State) -> State:
        """A state with everything that follows from it without looking at a key."""
        tensors = {n: t for n, t in values.tensors.items() if self.rank not in self.cascade.ranks.get(n, ())}
        here = values.with_tensors({**tensors, **known})
        for node in self._own:
            if node.name in known or self.turn[node.name] > turn:
                continue
            own = self.sums.get(node.name)
            if own is not None and own.terms:
                if all(key in state for key, _ in _parts(own)):
                    here.tensors[node.name] = self._polynomial(own, state, here)
            elif node.name in state:
                here.tensors[node.name] = state[node.name]
            elif self.rank not in self.cascade.space(node) and all(n in here.tensors for n in node.named):
                here.tensors[node.name] = compute(node, here)
        return {n: t for n, t in here.tensors.items() if n in self.cascade.by_name}

    def _polynomial(self, own: Sum, state: State, here: Values) -> Tensor:
        space = own.node.ranks
        parts = [
            state[key] * in_space(parse(term.times), own.node, here, space)
            for (key, _), term in zip(_parts(own), own.terms)
        ]
        return torch.stack(parts).sum(0)

    def _moved(self, own: Sum, value: Tensor, old: State, now: State, carried: State, values: Values) -> Tensor:
        """A sum made with old barriers as it would be with the new ones; nothing stays nothing."""
        found = value
        for g, power in own.change.of:
            word = g.removeprefix(POWER)
            if word.endswith("_carry"):
                if word not in carried:
                    continue
                x = aligned(carried[word], self._without(word.removesuffix("_carry")), own.node.ranks)
                found = found * torch.exp(power * x)
                continue
            x, y = (self._number(word, own.node, which, values) for which in (old, now))
            if own.change.kind == "A":
                found = found + power * torch.where(torch.isfinite(x) & torch.isfinite(y), y - x, 0.0)
                continue
            factor = torch.exp(power * (y - x)) if g.startswith(POWER) else (y / x) ** power
            found = torch.where(value == NEUTRAL[own.node.monoid], found, found * factor)
        return found

    def _without(self, name: str) -> list[str]:
        return [r for r in self.cascade.ranks[name] if r != self.rank]

    def _number(self, text: str, node: Node, settled: State, values: Values) -> Tensor:
        tensors = {n: t for n, t in values.tensors.items() if self.rank not in self.cascade.ranks.get(n, ())}
        here = values.with_tensors({**tensors, **settled})
        return in_space(parse(text), node, here, node.ranks)

    def _output(
        self, name: str, tensors: Mapping[str, Tensor], known: State, rows: dict[int, dict[str, Tensor]]
    ) -> Tensor:
        ranks = self.cascade.ranks[name]
        if self.rank not in ranks:
            return known[name] if name in known else tensors[name]
        return torch.cat([rows[k][name] for k in sorted(rows)], ranks.index(self.rank))

    def __str__(self) -> str:
        """The loops as they run: what a tile computes, and how the state takes it in."""
        return "\n".join([*(line for turn in range(1, self.passes + 1) for line in _loop(self, turn)), *_behind(self)])


def _cuts(whole: int, tile: int | Sequence[int]) -> list[range]:
    sizes = [tile] * -(-whole // tile) if isinstance(tile, int) else list(tile)
    ends = [0]
    for size in sizes:
        ends.append(min(ends[-1] + size, whole))
    return [range(a, b) for a, b in pairwise(ends)]


def _parts(own: Sum) -> list[tuple[str, Node]]:
    """What a sum keeps in a state: itself, or its coefficients, each with the node that computes it."""
    node = own.node
    if not own.terms:
        return [(node.name, node)]
    return [
        (
            f"{node.name}.{k}",
            Node(node.name, node.ranks, t.summed, node.kind, node.monoid, node.over, keep=node.keep, at=node.at),
        )
        for k, t in enumerate(own.terms)
    ]


# --- the loops in words -----------------------------------------------------------------------------------------------


def _loop(nest: LoopNest, turn: int) -> list[str]:
    """One pass over the tiles."""
    backwards = ", last tile first" if nest.reverse else ""
    inner = [n for n in nest.cascade.needed(nest.cascade.outputs) if _inside(nest, n, turn)]
    return [
        f"for each tile of {nest.rank}{backwards}:  # pass {turn} of {nest.passes}",
        *([f"    {_line(nest, node)}" for node in inner] or ["    pass"]),
    ]


def _behind(nest: LoopNest) -> list[str]:
    """What is left to compute once all tiles are in, and how the states of tiles may meet."""
    left = [str(n) for n in nest.cascade.needed(nest.cascade.outputs) if nest.rank not in nest.cascade.space(n)]
    order = "in any order" if nest.commutes else "of neighbours"
    follow = f"tiles follow each other: {nest.in_order}"
    return [*left, f"# {follow if nest.in_order else f'states merge associatively, {order}'}"]


def _inside(nest: LoopNest, node: Node, turn: int) -> bool:
    return nest.turn[node.name] == turn and nest.rank in nest.cascade.space(node)


def _line(nest: LoopNest, node: Node) -> str:
    own = nest.sums.get(node.name)
    if own is None:
        return str(node)
    if own.terms:
        parts = [f"{node.monoid}({t.summed}) * ({t.times})" for t in own.terms]
        return f"{node.name} += {' + '.join(parts)}, each sum by itself"
    moved = f"{node.name} * {correction(own.change)}" if own.change.kind == "S" else node.name
    if own.change.kind == "A":
        moved = f"{node.name} + {correction(own.change)}"
    if node.monoid == "sum":
        return f"{node.name} = {moved} + {node.right}"
    return f"{node.name} = {node.monoid}({moved}, {node.right})"
