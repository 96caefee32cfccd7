"""A task made of the caller's own calls: how far the answers move from the original's."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch import Tensor
from torch.utils import _pytree as pytree

from ...compiler.held_out import Batch
from ...compiler.verification import CHOICE_WIDTH, compare
from .task import KL, TOP1, Measure, Part, Tally, Task, agreement

DEFINITION = 1  # raised whenever a number would come out differently


def given(calls: Sequence[Batch]) -> Task:
    settings = {"definition": DEFINITION, "calls": len(calls), "data": _print(calls)}
    measures = (
        Measure("relative", "relative deviation from the original's answers", False, 1.0),
        Measure("cosine", "cosine with the original's answers", True, 0.0),
        KL,
        TOP1,
    )
    return Task("data", measures, settings, lambda: (Part(tuple(calls), _judge, against=True),))


def _judge(_: int, got: Tensor, before: Tensor | None) -> Tally:
    assert before is not None
    found = compare(got, before)
    apart = {"relative": (found.relative, 1.0), "cosine": (found.cosine, 1.0)}
    return apart | (agreement(got, before) if before.shape[-1] >= CHOICE_WIDTH else {})


def _print(calls: Sequence[Batch]) -> str:
    found = hashlib.sha256()
    for leaf in pytree.tree_leaves(list(calls)):
        data = leaf.detach().cpu().contiguous().numpy().tobytes() if isinstance(leaf, Tensor) else b""
        found.update(f"{tuple(leaf.shape)} {leaf.dtype}".encode() + data if data else repr(leaf).encode())
    return found.hexdigest()
