"""What torch says in one call of its attention, by the generated loops: for the twins of graphs that quick.py runs."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ...compiler.primitives.attend_spec import CAUSAL, AttendSpec
from . import attend

_FAINT = -1e30  # a finite bias below it still counts where a row has no other: torch knows how


def instead(q: Tensor, k: Tensor, v: Tensor, row: Tensor | None, causal: bool, scale: float | None) -> Tensor | None:
    """The output, laid out as torch lays it; None where the loops cannot say the call. `row`: a bias (B, 1, 1, M)."""
    if row is not None and (row.ndim != 4 or row.shape[1] != 1 or row.shape[2] != 1 or not row.is_floating_point()):
        return None
    if row is not None and not bool(((row >= _FAINT) | (row == -torch.inf)).all()):
        return None
    tables = [] if row is None else [row[:, 0, 0].expand(q.shape[0], -1)]
    groups = [[q], [k, v], tables]
    text = _text(row is not None, causal, q.shape[-1] ** -0.5 if scale is None else scale)
    return None if attend.refuses(groups, text) else attend.run(groups, text, heads_inside=True)[0]


@lru_cache(maxsize=64)
def _text(biased: bool, causal: bool, scale: float) -> str:
    score = f"s * {scale!r} + t0[b, j]" if biased else f"s * {scale!r}"
    keep = [f"{_FAINT!r} <= t0[b, j]"] * biased + [CAUSAL] * causal
    return AttendSpec(score=score, keep=" & ".join(f"({k})" for k in keep)).text
