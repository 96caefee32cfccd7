"""Which tiles of the N x M pairs a predicate leaves empty, keeps whole or cuts: never N x M, for bands never all tiles.

A band (conditions affine in i and j) has its tiles in closed form: for each row of tiles a few runs of key tiles. Any
other predicate is asked about the corners of every tile at once. Both are sound; a band's classes are exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .boxes import everywhere, nowhere
from .refusal import Refused
from .symbol_eval import evaluate
from .symbol_text import parse
from .symbols import Expr, build, const, linear

EMPTY, PARTIAL, FULL = 0, 1, 2
MOST_RUNS = 8  # of key tiles in one row of tiles, beyond which every tile is asked
MOST_TILES = 1 << 26  # that are asked one by one


@dataclass(frozen=True)
class Runs:
    """For each row of tiles some runs first..last of key tiles, (rows, runs) each; a run with last < first is none."""

    first: Tensor
    last: Tensor

    def __and__(self, other: Runs) -> Runs:
        first = torch.maximum(self.first.unsqueeze(2), other.first.unsqueeze(1)).flatten(1)
        return Runs(first, torch.minimum(self.last.unsqueeze(2), other.last.unsqueeze(1)).flatten(1))

    def __or__(self, other: Runs) -> Runs:
        return Runs(torch.cat([self.first, other.first], 1), torch.cat([self.last, other.last], 1))

    def apart(self) -> Runs:
        """The same tiles in order, none of them twice."""
        order = torch.where(self.last < self.first, torch.iinfo(torch.int64).max, self.first).argsort(1)
        first, last = self.first.gather(1, order), self.last.gather(1, order)
        before = torch.nn.functional.pad(last, (1, 0), value=-1)[:, :-1].cummax(1).values
        return Runs(torch.maximum(first, before + 1), last)

    @property
    def count(self) -> int:
        """Of the tiles in runs that are apart."""
        return int((self.last - self.first + 1).clamp(min=0).sum())

    def within(self, columns: int) -> Tensor:
        """(rows, columns), True for every tile in a run."""
        at = torch.arange(columns).view(1, 1, -1)
        return ((at >= self.first.unsqueeze(2)) & (at <= self.last.unsqueeze(2))).any(1)


@dataclass(frozen=True)
class Tiles:
    """What a predicate does to tiles of `tile` queries by keys."""

    grid: tuple[int, int]
    tile: tuple[int, int]
    seen: Runs | Tensor  # not empty: runs, or a class for every tile
    full: Runs | None = None

    @property
    def counts(self) -> tuple[int, int, int]:
        """Empty, cut and whole tiles."""
        if isinstance(self.seen, Tensor):
            empty, partial, full = torch.bincount(self.seen.flatten().long(), minlength=3).tolist()
            return empty, partial, full
        assert self.full is not None
        seen, full = self.seen.count, self.full.count
        return self.grid[0] * self.grid[1] - seen, seen - full, full

    def classes(self) -> Tensor:
        """(rows, columns) of EMPTY, PARTIAL, FULL: for pictures and tests; a long band has too many to ask for."""
        if isinstance(self.seen, Tensor):
            return self.seen
        assert self.full is not None
        return sum((runs.within(self.grid[1]).to(torch.int8) for runs in (self.seen, self.full)), torch.tensor(0))

    def __str__(self) -> str:
        total = max(1, self.grid[0] * self.grid[1])
        empty, cut, full = (100 * count / total for count in self.counts)
        size = f"{self.tile[0]} x {self.tile[1]}"
        return f"tiles of {size}: {full:.1f} % whole, {cut:.1f} % cut, {empty:.1f} % never visited"


def tiles_of(predicate: Expr, n: int, m: int, tile: tuple[int, int] = (64, 64), *, offset: int = 0) -> Tiles:
    """The classes of all tiles; query row r stands at position r + `offset`, as where the sides are aligned at the end.

    >>> from .symbol_text import parse
    >>> tiles_of(parse("(j <= i) & (i <= j + 255)"), 1 << 20, 1 << 20).counts
    (268353546, 32764, 49146)
    """
    rows, columns = -(-n // tile[0]), -(-m // tile[1])
    first = torch.arange(rows).view(-1, 1) * tile[0]
    band = _Band(first + offset, (first + tile[0]).clamp(max=n) - 1 + offset, m, columns, tile[1])
    sized = predicate.replace({"N": const(n), "M": const(m)})
    some, never, always = _corners(sized.text)
    seen, full = band.runs(some), band.runs(always)
    if seen is not None and full is not None:
        return Tiles((rows, columns), tile, seen.apart(), full.apart())
    if rows * columns > MOST_TILES:
        raise Refused(f"{rows} x {columns} tiles of {predicate}", where="tiles", fits="a band, or larger tiles")
    return Tiles((rows, columns), tile, band.asked(never, always))


@lru_cache(maxsize=256)
def _corners(text: str) -> tuple[Expr, Expr, Expr]:
    """Formulas of a box's corners: some pair may be kept, none is, all are."""
    predicate = parse(text)
    never = nowhere(predicate)
    return build("not", never), never, everywhere(predicate)


@lru_cache(maxsize=1024)
def _affine(text: str) -> tuple[Mapping[str, tuple[Expr, int]], int]:
    """left <= right as terms and a constant whose sum is at most 0."""
    return linear(build("sub", *parse(text).args))


@dataclass(frozen=True)
class _Band:
    """The rows of tiles by their first and last query, (rows, 1), and how the keys are cut."""

    i0: Tensor
    i1: Tensor
    m: int
    columns: int
    wide: int

    def runs(self, e: Expr) -> Runs | None:
        """The tiles at whose corners a formula holds; None where it is no band, or falls into too many runs."""
        if e.op == "const":
            return self._between(0 if e.args[0] else self.columns, self.columns - 1)
        if e.op == "le":
            return self._half(*_affine(e.text))
        if e.op not in ("and", "or"):
            return None
        total: Runs | None = None
        for arg in e.args:
            part = self.runs(arg)
            if part is None:
                return None
            total = part if total is None else total & part if e.op == "and" else total | part
            if total.first.shape[1] > MOST_RUNS:
                return None
        return total

    def _half(self, terms: Mapping[str, tuple[Expr, int]], constant: int) -> Runs | None:
        """The tiles where a sum of corners is at most 0: from the left up to one, or from one on."""
        known = {"i0": self.i0, "i1": self.i1}
        keys = [text for text in terms if text not in known]
        numbers = (constant, *(factor for _, factor in terms.values()))
        if len(keys) > 1 or not {*keys} <= {"j0", "j1"} or not all(isinstance(number, int) for number in numbers):
            return None
        rest = sum((factor * known[text] for text, (_, factor) in terms.items() if text in known), constant)
        room = -torch.as_tensor(rest).expand_as(self.i0)
        if not keys:
            return self._between(torch.where(room >= 0, 0, self.columns), self.columns - 1)
        factor = terms[keys[0]][1]
        at = room // factor if factor > 0 else -(room // -factor)
        if keys == ["j0"] and factor > 0:
            return self._between(0, at // self.wide)
        if keys == ["j0"]:
            return self._between(-(-at // self.wide), self.columns - 1)
        if factor > 0:  # the last key of the last tile is m - 1
            return self._between(0, torch.where(at >= self.m - 1, self.columns, (at + 1) // self.wide) - 1)
        first = -(-(at + 1) // self.wide) - 1
        return self._between(torch.where(at > self.m - 1, self.columns, first), self.columns - 1)

    def _between(self, first: Tensor | int, last: Tensor | int) -> Runs:
        low, high = (torch.as_tensor(end).expand_as(self.i0) for end in (first, last))
        return Runs(low.clamp(0, self.columns), high.clamp(-1, self.columns - 1))

    def asked(self, never: Expr, always: Expr) -> Tensor:
        """The class of every tile, from its corners; what depends on batch, head or a table is cut."""
        j0 = torch.arange(self.columns).view(1, -1) * self.wide
        corners = {"i0": self.i0, "i1": self.i1, "j0": j0, "j1": (j0 + self.wide).clamp(max=self.m) - 1}
        no, yes = (self._holds(e, corners) for e in (never, always))
        return torch.where(no, EMPTY, torch.where(yes, FULL, PARTIAL)).to(torch.int8)

    def _holds(self, e: Expr, corners: Mapping[str, Tensor]) -> Tensor:
        if e.op == "and":
            return torch.stack([self._holds(a, corners) for a in e.args]).all(0)
        if e.op == "or":
            return torch.stack([self._holds(a, corners) for a in e.args]).any(0)
        value = evaluate(e, corners, {}) if e.names <= corners.keys() else False
        return torch.as_tensor(value).expand(len(self.i0), self.columns)
