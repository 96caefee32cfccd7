"""`merge` as Triton: parts of attention put together, a block of rows at a time."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ...compiler.primitives.merge import MergeSpec, merge_meaning
from ...compiler.primitives.operator import Groups
from .blocks import padded
from .launching import KINDS, UnfitError, launched, unfit
from .skeleton import filled, text_of

_MOST_D, _MOST_PARTS = 512, 64  # parts are arguments each


@lru_cache(maxsize=256)
def source(by: str, parts: int) -> str:
    """The whole module."""
    flags = {"LOGS": by == "lse"}
    state = "o, total, top" if by == "lse" else "o, total"
    said = {
        "parts": "".join(f"P{n}, L{n}, " for n in range(parts)),
        "top": "top, " if by == "lse" else "",
        "steps": [f"{state} = of_part({state}, P{n}, L{n}, n, inside, E, EP)" for n in range(parts)],
    }
    return "".join([text_of("functions"), filled("merge_part", flags, said), filled("merge", flags, said)])


def refuses(groups: Groups, text: str) -> str | None:
    """Why a call is not handed to the kernel."""
    parts, logs = groups
    reason = unfit(groups)
    if reason:
        return reason
    for t in (*parts, *logs):
        if t.dtype not in KINDS:
            return f"{t.dtype}"
    if len(parts) > _MOST_PARTS:
        return f"{len(parts)} parts, at most {_MOST_PARTS}"
    if parts[0].shape[-1] > _MOST_D:
        return f"rows of {parts[0].shape[-1]}, at most {_MOST_D}"
    return None if parts[0].numel() else "no rows"


def run(groups: Groups, text: str) -> list[Tensor]:
    """o and lse, or numerators and denominators; by the plain meaning where the kernel does not fit a device."""
    parts, logs = ([t.contiguous() for t in group] for group in groups)
    E, rows = parts[0].shape[-1], logs[0].numel()
    o, lse = torch.empty_like(parts[0]), torch.empty_like(logs[0], dtype=torch.float32)
    block = max(1, min(64, 4096 // padded(E)))
    given = {f"P{n}": t for n, t in enumerate(parts)} | {f"L{n}": t for n, t in enumerate(logs)}
    sizes = {"R": rows, "E": E, "EP": padded(E), "BM": block, "num_warps": 4}
    kernel = source(MergeSpec.of(text).by, len(parts))
    try:
        launched(kernel, "merge", (-(-rows // block),), {**given, "O": o, "LSE": lse, **sizes})
    except UnfitError:
        return merge_meaning(groups, text)
    return [o, lse]
