"""`same_past`: what a state has summed cannot be summed anew, so a call that tells it otherwise is refused, not wrong.

A state holds, in place of what it was told of each key (padding), the count and a digest of it: two numbers a sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..refusal import Refused
from .operator import Groups, Primitive

_ODD = (0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64)  # of splitmix64


def digest(told: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Of whole numbers told of keys (B, M): their sum and their digest (B, 2) over the keys seen before, and over all.

    `seen` is (P, 0): its size is how many those are.

    >>> told = torch.tensor([[0, 1, 1, 1]])
    >>> before, after = digest(told, torch.empty(3, 0))
    >>> before[0, 0], after[0, 0], torch.equal(before, digest(told[:, :3], torch.empty(2, 0))[1])
    (tensor(2), tensor(3), True)
    """
    values = told.long()
    mixed = torch.arange(1, values.shape[1] + 1, device=told.device) * _ODD[0]
    mixed = (mixed ^ (mixed >> 31)) * _ODD[1]  # whole numbers of 64 bits wrap around
    marks = torch.stack((values, values * (mixed ^ (mixed >> 29))), -1)
    return marks[:, : seen.shape[0]].sum(1), marks.sum(1)


def _same(groups: Groups, text: str) -> list[Tensor]:
    (now,), (asked,), held = groups
    for before in held:
        if not torch.equal(before, asked.expand_as(before)):
            found = "what this call says of keys that came before is not what their state was told: other padding"
            raise Refused(found, where=text, fits="the mask of the calls before, longer; DynamicCache() for this call")
    return [now.expand(held[0].shape[0], -1).clone()]


def _sizes(groups: Groups, text: str) -> list[Tensor]:
    (now,), _, held = groups
    return [now.new_empty(held[0].shape)]


same_past_op = Primitive("same_past", ("now", "asked", "held*"), _same, _sizes)
