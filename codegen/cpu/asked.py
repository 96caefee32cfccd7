"""Relative terms inside the loops of `attend`: which rows of R a box of pairs asks for, R as products take it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...compiler.boxes import bounds
from ...compiler.primitives.attend_spec import AttendSpec
from ...compiler.primitives.operator import Groups
from ...compiler.refusal import Refused
from ...compiler.symbol_text import parse
from .printer import cpp

PANEL = 64  # rows of R that lie together
_MOST = 1 << 14  # rows of R: a block of queries keeps its products with all of them


def inside(groups: Groups, text: str, halves: str) -> bool:
    """Whether products with R are made block by block, in float32; otherwise torch makes them before."""
    terms, tables = AttendSpec.of(text).relative, groups[-1]
    return bool(terms) and not halves and all(
        side == "q" and 0 < tables[int(table[1:])].shape[1] <= _MOST for table, _, side in terms
    )  # fmt: skip


def said(indices: Sequence[str]) -> str:
    """For a skeleton: the rows of each R that a box of queries and keys can ask for."""
    cases = [f"case {number}: return {_span(index)};" for number, index in enumerate(indices)]
    box = "int i0, int i1, int j0, int j1"
    return (
        "struct Span { int low, high; };\n"
        f"INLINE Span asked(int number, int b, int h, {box}, int last) {{ switch (number) {{ "
        f"{' '.join([*cases, 'default: return {0, last};'])} }} }}"
    )


def _span(index: str) -> str:
    ends = bounds(parse(index))
    try:
        return "{0, last}" if ends is None else f"{{{', '.join(cpp(e, 'si') for e in ends)}}}"
    except Refused:  # sizes of the call, which loops do not know
        return "{0, last}"


def panels(R: Tensor, kept: list[Tensor]) -> tuple[Tensor, int, int, int]:
    """R (heads, rows, D) as (heads, panels, D, PANEL), the last one filled up; rows, panels, heads."""
    heads, rows, _ = R.shape
    count = -(-rows // PANEL)
    whole = torch.nn.functional.pad(R.float(), (0, 0, 0, count * PANEL - rows))
    kept.append(whole.unflatten(1, (count, PANEL)).mT.contiguous())
    return kept[-1], rows, count, heads
