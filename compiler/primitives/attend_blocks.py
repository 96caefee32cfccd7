"""The meaning of `attend` some rows at a time, where all of them would hold too much: each query stands by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..reach import reach
from ..symbol_text import parse
from .attend_meaning import attend_meaning
from .attend_spec import AttendSpec, count_of
from .attend_stored import in_numbers
from .operator import Groups

AT_ONCE = 2**19  # scores, and numbers of rows gathered for them: 200 bytes each where a predicate is worked out; what
# is worked on fits the caches (of 4096 causal tokens, four times as many take half as long again)
BY_ROWS = {"o", "lse", "entropy", "topk"}  # outputs that a query has for itself, and that are not as long as the keys


def attend_in_blocks(groups: Groups, text: str) -> list[Tensor]:
    """Every block of queries is a call of its own, with the positions of its queries."""
    groups, text = in_numbers(groups, text)
    (q,), kv, tables = groups
    spec = AttendSpec.of(text)
    total, step = q.shape[2], _rows_at_once(q, kv, tables, spec)
    if step >= total or not _apart(spec):
        return attend_meaning(groups, text)
    own = replace(spec, align="start", q_positions=spec.q_positions or f"t{len(tables)}").text
    offset = kv[0].shape[2] - total if spec.align == "end" else 0
    if not spec.q_positions:
        tables = [*tables, torch.arange(total, device=q.device) + offset]
    parts, ahead = [], _ahead(spec)
    for first in range(0, total, step):
        block = [_of_rows(f"t{n}", t, first, first + step, AttendSpec.of(own)) for n, t in enumerate(tables)]
        near = kv if ahead is None else [t[:, :, : first + step + ahead + offset] for t in kv]
        parts.append(attend_meaning([[q[:, :, first : first + step]], near, block], own))
    return [torch.cat(outputs, 2) for outputs in zip(*parts, strict=True)]


def _apart(spec: AttendSpec) -> bool:
    """Whether a query's outputs need no other query, and nothing is said by how many queries there are."""
    return not _says(spec, "N") and all(count_of(which)[0] in BY_ROWS for which in spec.outputs)


def _ahead(spec: AttendSpec) -> int | None:
    """How far behind its last query a block's keys can lie, those further on being cut off; None: they stay.

    Keys keep their numbers, so that only what is said by how many there are forbids it.
    """
    plain = not (spec.q_positions or spec.k_positions or spec.more or any(spec.rows) or spec.tiles or spec.empty)
    if not plain or _says(spec, "M") or not set(spec.outputs) <= {"o", "lse", "entropy"}:
        return None
    return reach(spec.text).ahead


def _says(spec: AttendSpec, size: str) -> bool:
    texts = [spec.score, spec.keep, spec.weight, spec.after, spec.leader, spec.empty, spec.sink]
    texts += [t for keep, score, _ in spec.more for t in (keep, score)] + [index for _, index, _ in spec.relative]
    return any(size in parse(t).names for t in texts if t)


def _rows_at_once(q: Tensor, kv: Sequence[Tensor], tables: Sequence[Tensor], spec: AttendSpec) -> int:
    numbers = 0
    for index, (k, v) in enumerate(zip(kv[::2], kv[1::2], strict=True)):
        name = spec.rows_of(index)
        table = tables[int(name[1:])] if name else k[..., 0]
        each = 1 + k.shape[-1] + v.shape[-1] if name and table.ndim == 4 else 1  # rows of its own for every query
        numbers += table.shape[-1] * each
    step = max(1, AT_ONCE // max(1, q.shape[0] * q.shape[1] * numbers))
    whole = spec.tiles[1] if spec.tiles else 1  # queries that one list of tiles is for
    return max(1, step // whole) * whole


def _of_rows(name: str, table: Tensor, first: int, last: int, spec: AttendSpec) -> Tensor:
    """A table's part for some queries, where it has one for each."""
    if name == spec.q_positions:
        return table[..., first:last]
    if name in spec.rows and table.ndim == 4:
        return table[:, :, first:last]
    if spec.tiles and name == spec.tiles[0]:
        return table[:, :, first // spec.tiles[1] : -(-last // spec.tiles[1])]
    return table
