"""A slot: the entries along one axis of one weight that stand for one space of channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Digit = tuple[int, int]  # (stride, size): one factor of an axis


@dataclass(frozen=True)
class Slot:
    """Channel c of a space is entry index()[c] of a weight's axis; fused weights hold several spaces on one axis.

    >>> print(Slot("c_attn.weight", 1, ((1, 32),), 64))
    c_attn.weight[1: 64..95]
    >>> Slot("qkv.weight", 0, ((6, 2), (1, 2)), 2).index().tolist()  # heads of (q, k, v), two channels each
    [2, 3, 8, 9]
    """

    weight: str
    axis: int
    digits: tuple[Digit, ...]
    offset: int = 0

    @property
    def count(self) -> int:
        total = 1
        for _, size in self.digits:
            total *= size
        return total

    def index(self) -> Tensor:
        found = torch.tensor([self.offset])
        for stride, size in self.digits:
            found = (found[:, None] + stride * torch.arange(size)).reshape(-1)
        return found

    def part(self, digits: tuple[Digit, ...], offset: int) -> Slot | None:
        """The slot of some of this space's channels; None where this one is no single run."""
        if len(self.digits) != 1:
            return None
        stride = self.digits[0][0]
        inner = merged(tuple((stride * s, n) for s, n in digits))
        return Slot(self.weight, self.axis, inner, self.offset + stride * offset)

    def take(self, weight: Tensor) -> Tensor:
        """(count, everything else): the slot's entries first."""
        return weight.index_select(self.axis, self.index().to(weight.device)).movedim(self.axis, 0)

    def put(self, weight: Tensor, entries: Tensor) -> Tensor:
        """The weight with these entries in the slot."""
        return weight.index_copy(self.axis, self.index().to(weight.device), entries.movedim(0, self.axis))

    def __str__(self) -> str:
        if len(self.digits) == 1 and self.digits[0][0] == 1:
            return f"{self.weight}[{self.axis}: {self.offset}..{self.offset + self.count - 1}]"
        steps = " ".join(f"{n}x{s}" for s, n in self.digits)
        return f"{self.weight}[{self.axis}: {self.offset} + {steps}]"


def merged(digits: tuple[Digit, ...]) -> tuple[Digit, ...]:
    """Neighbouring factors that count through without a gap as one; factors of one entry left out.

    >>> merged(((16, 2), (4, 4), (1, 3)))
    ((4, 8), (1, 3))
    """
    found: list[Digit] = []
    for stride, size in digits:
        if size == 1:
            continue
        if found and found[-1][0] == stride * size:
            found[-1] = (stride, found[-1][1] * size)
        else:
            found.append((stride, size))
    return tuple(found) or ((1, 1),)
