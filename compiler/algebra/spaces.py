"""Spaces of channels: what writes into each, what reads from it, and what ties it to others or pins its basis."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from .slots import Digit, Slot


@dataclass(frozen=True)
class Label:
    """Which dimensions of a value run over channels of a space: a factor of its index each, None elsewhere."""

    space: int
    dims: tuple[Digit | None, ...]

    @property
    def digits(self) -> tuple[Digit, ...]:
        return tuple(d for d in self.dims if d is not None)


@dataclass(frozen=True)
class Norm:
    """A normalisation from one space to another. Its weight is a scale per channel, absorbed by what reads the output.

    neutral: the weight that scales by nothing (0 where the model multiplies by 1 + w).
    """

    kind: str  # rms | layer
    where: str
    before: int = field(compare=False)
    after: int = field(compare=False)
    weight: str = ""
    bias: str = ""
    neutral: float = 1.0


@dataclass
class Spaces:
    """All spaces of a graph. Two are one space where values of them are added; `like` also joins what goes channel by
    channel (activations, norms, products), so that one permutation fits all of a class."""

    sizes: list[int] = field(default_factory=list)
    _same: list[int] = field(default_factory=list)
    _like: list[int] = field(default_factory=list)
    _writes: list[tuple[int, Slot]] = field(default_factory=list)
    _reads: list[tuple[int, Slot]] = field(default_factory=list)
    _diagonals: list[tuple[int, Slot]] = field(default_factory=list)
    _users: list[tuple[int, str, str]] = field(default_factory=list)  # (space, operation, weight)
    _pins: list[tuple[int, str]] = field(default_factory=list)  # what fixes the order of channels
    _kinks: list[tuple[int, str]] = field(default_factory=list)  # what lets them be permuted, not mixed
    norms: list[Norm] = field(default_factory=list)
    products: list[tuple[int, int, int]] = field(default_factory=list)  # (left, right, result)
    _children: dict[tuple[int, int, tuple[Digit, ...]], int] = field(default_factory=dict)

    def new(self, size: int, writes: Iterable[Slot] = (), by: str = "") -> int:
        """A space that the operation `by` writes."""
        number = len(self.sizes)
        self.sizes.append(size)
        self._same.append(number)
        self._like.append(number)
        self._writes += [(number, slot) for slot in writes]
        self._users += [(number, by, slot.weight) for slot in writes]
        return number

    def whole(self, space: int) -> Digit:
        return (1, self.sizes[space])

    def same(self, space: int) -> int:
        return _root(self._same, space)

    def like(self, space: int) -> int:
        return _root(self._like, space)

    def join(self, one: int, other: int) -> None:
        self._same[self.same(other)] = self.same(one)
        self._like[self.like(other)] = self.like(one)

    def tie(self, one: int, other: int) -> None:
        """One permutation for both."""
        self._like[self.like(other)] = self.like(one)

    def read(self, space: int, slot: Slot, by: str) -> None:
        self._reads.append((space, slot))
        self._users.append((space, by, slot.weight))

    def diagonal(self, space: int, slot: Slot, by: str) -> None:
        self._diagonals.append((space, slot))
        self._users.append((space, by, slot.weight))

    def users(self, members: Iterable[int]) -> frozenset[tuple[str, str]]:
        """(operation, weight) of all that write to these spaces, read from them or scale them."""
        inside = set(members)
        return frozenset((by, weight) for space, by, weight in self._users if space in inside)

    def pin(self, space: int, reason: str) -> None:
        self._pins.append((space, reason))

    def kink(self, space: int, reason: str) -> None:
        self._kinks.append((space, reason))

    def members(self, space: int, *, alike: bool = False) -> tuple[int, ...]:
        root = self.like if alike else self.same
        return tuple(s for s in range(len(self.sizes)) if root(s) == root(space))

    def writes(self, members: Iterable[int]) -> tuple[Slot, ...]:
        return _of(self._writes, members)

    def reads(self, members: Iterable[int]) -> tuple[Slot, ...]:
        return _of(self._reads, members)

    def diagonals(self, members: Iterable[int]) -> tuple[Slot, ...]:
        return _of(self._diagonals, members)

    def pins(self, members: Iterable[int]) -> tuple[str, ...]:
        inside = set(members)
        return tuple(dict.fromkeys(reason for space, reason in self._pins if space in inside))

    def kinks(self, members: Iterable[int]) -> tuple[str, ...]:
        inside = set(members)
        return tuple(dict.fromkeys(reason for space, reason in self._kinks if space in inside))

    def child(self, space: int, offset: int, dims: tuple[Digit | None, ...]) -> Label | None:
        """A space of its own for some of the channels of another: one of q, k, v in a fused weight, half of a gate."""
        digits = tuple(d for d in dims if d is not None)
        parts = [slot.part(digits, offset) for owner, slot in self._writes if owner == space]
        if not parts or any(p is None for p in parts) or list(digits) != sorted(digits, reverse=True):
            return None
        key = (space, offset, digits)
        if key not in self._children:
            by = next(by for owner, by, _ in self._users if owner == space)
            self._children[key] = self.new(math.prod(n for _, n in digits), [p for p in parts if p is not None], by)
            self.pin(space, "its channels are divided")
        fresh: list[Digit | None] = []
        for dim in reversed(dims):
            inner = math.prod(d[1] for d in fresh if d is not None)
            fresh.append(None if dim is None else (inner, dim[1]))
        return Label(self._children[key], tuple(reversed(fresh)))


def _root(parents: list[int], space: int) -> int:
    while parents[space] != space:
        space = parents[space]
    return space


def _of(pairs: list[tuple[int, Slot]], members: Iterable[int]) -> tuple[Slot, ...]:
    inside = set(members)
    return tuple(dict.fromkeys(slot for space, slot in pairs if space in inside))
