"""What a call of `attend` asks for beside q, as one value: a site that stands behind the call refines the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

Predicate = Callable[..., Any]


@dataclass(frozen=True)
class Segment:
    """One more source of keys under the same normaliser: its own positions, predicate and score."""

    k: Tensor  # (B, Hkv, M, Dq)
    v: Tensor  # (B, Hkv, M, Dv)
    keep: Predicate | None = None
    score: Predicate | None = None
    positions: Tensor | None = None  # (M,), (B, M), (B, H, M): the logical position j of each row; else 0, 1, ...
    rows: Tensor | None = None  # (B|1, H|Hkv|1, L) or (.., N, L): the rows that stand as keys, -1 none; else all


@dataclass(frozen=True)
class Relative:
    """A term q_i . R[index(h, i, j)] (of="k": k_j . R[...]) added to q_i . k_j; indices are clamped to R's rows."""

    table: Tensor  # (H|1, L, Dq)
    index: Predicate
    of: str = "q"


@dataclass(frozen=True)
class Tiles:
    """Which tiles of keys each tile of queries sees, as lists of tile numbers, -1 for none."""

    table: Tensor  # (B|1, H|1, ceil(N / queries), L)
    queries: int
    keys: int


class Asked(NamedTuple):
    """The arguments of `attend`, which says what each of them means; a tuple, because one is made at every call."""

    main: Segment  # k, v and what is said of them
    segments: Sequence[Segment]
    normaliser: str
    eps: float
    weight: Predicate | None
    sink: Predicate | None
    after: Predicate | None
    leader: Predicate | None
    relative: Sequence[Relative]
    tiles: Tiles | None
    kv_heads: Tensor | None
    outputs: Sequence[str]

    @property
    def every(self) -> tuple[Segment, ...]:
        return (self.main, *self.segments)

    @property
    def kv(self) -> list[Tensor]:
        """k, v of every segment, as the op takes them."""
        return [t for part in self.every for t in (part.k, part.v)]

    @property
    def other_keys(self) -> bool:
        """Whether a query meets other keys than a plain softmax over the main segment's, or meets them otherwise."""
        told = (self.main.keep, self.main.score, self.tiles, self.leader)
        plain = self.normaliser == "softmax" and self.main.rows is None and not self.segments and not self.relative
        return not plain or any(told)
