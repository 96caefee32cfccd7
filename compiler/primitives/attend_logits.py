"""The logits of `attend`, segment by segment: which rows stand as keys, where, with which score, kept or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..refusal import Refused
from ..symbol_eval import evaluate
from ..symbol_text import parse
from .attend_spec import AttendSpec
from .row_index import whole_rows
from .rows import repeat_heads

Named = Mapping[str, Tensor]


@dataclass(frozen=True)
class Columns:
    """One segment as every query sees it; v has a dimension of queries where each query has rows of its own."""

    logits: Tensor  # (B, H, N, M)
    kept: Tensor  # the same, bool
    v: Tensor  # (B, H, M, Dv) or (B, H, N, M, Dv)
    names: dict[str, Any]
    whole: frozenset[str]


def columns(q: Tensor, kv: Sequence[Tensor], tables: Named, spec: AttendSpec) -> list[Columns]:
    pairs = list(zip(kv[::2], kv[1::2], strict=True))
    offset = pairs[0][0].shape[-2] - q.shape[-2] if spec.align == "end" else 0
    return [_segment(index, q, k, v, offset, tables, spec) for index, (k, v) in enumerate(pairs)]


def _segment(index: int, q: Tensor, k: Tensor, v: Tensor, offset: int, tables: Named, spec: AttendSpec) -> Columns:
    keep, score, k_map = spec.segments[index]
    wide = torch.promote_types(q.dtype, torch.float32)
    k_all, v_all = (_to_heads(t, q, tables, spec).to(wide) for t in (k, v))
    rows = _rows(tables[spec.rows_of(index)], q, tables, spec) if spec.rows_of(index) else None
    names, whole = _index_space(q, k_all.shape[-2], rows, k_map, offset, tables, spec)
    k_seen, v_seen = (k_all, v_all) if rows is None else (_picked(k_all, rows), _picked(v_all, rows))
    names["s"] = _products(q.to(wide), k_seen)
    for number, (table, where, side) in enumerate(spec.relative):
        if f"r{number}" in parse(score).names or f"r{number}" in (parse(spec.after).names if spec.after else ()):
            names[f"r{number}"] = _relative(q.to(wide), k_seen, tables[table].to(wide), where, side, names, tables)
    logits = torch.as_tensor(evaluate(parse(score), names, tables, whole=whole), dtype=wide, device=q.device)
    kept = _kept(keep, rows, q, names, tables, whole)
    if spec.tiles and index == 0:
        kept = kept & _in_tiles(spec, q.shape[2], k.shape[2], tables)
    shape = names["s"].shape
    return Columns(logits.expand(shape), kept.expand(shape), v_seen, names, whole)


def _to_heads(t: Tensor, q: Tensor, tables: Named, spec: AttendSpec) -> Tensor:
    if not spec.kv_heads:
        return repeat_heads(t, q)
    return t.expand(q.shape[0], *t.shape[1:]).index_select(1, tables[spec.kv_heads].long())


def _rows(table: Tensor, q: Tensor, tables: Named, spec: AttendSpec) -> Tensor:
    """Indices of key rows (B, H, L) or (B, H, N, L)."""
    if table.shape[1] == q.shape[1] or table.shape[1] == 1:
        return table.long().expand(*q.shape[:2], *table.shape[2:])
    return _to_heads(table.long(), q, tables, spec)


def _picked(t: Tensor, rows: Tensor) -> Tensor:
    """The rows of t (B, H, M, D) that an index (B, H, ..., L) names; -1 picks any, its column is not kept."""
    if t.shape[2] == 0:
        return t.new_zeros(*rows.shape, t.shape[-1])
    return whole_rows(t, rows.clamp(0, t.shape[2] - 1))


def _products(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT if k.ndim == 4 else (k @ q.unsqueeze(-1)).squeeze(-1)


def _index_space(
    q: Tensor, m: int, rows: Tensor | None, k_map: str, offset: int, tables: Named, spec: AttendSpec
) -> tuple[dict[str, Any], frozenset[str]]:
    """Tensors for b, h, i, j that broadcast over (B, H, N, M), and which of them count 0, 1, 2, ..."""
    (batch, heads, n), count = q.shape[:3], torch.arange
    i = (
        _positions(tables[spec.q_positions], q)
        if spec.q_positions
        else (count(n, device=q.device) + offset)[None, None]
    )
    j = _positions(tables[k_map], q) if k_map else count(m, device=q.device)[None, None]
    if rows is not None:
        flat = rows.clamp(0, max(m - 1, 0)).flatten(2)
        j = j.expand(*flat.shape[:2], m).gather(2, flat).reshape(rows.shape) if k_map else rows
    names = {
        "b": count(batch, device=q.device).view(batch, 1, 1, 1),
        "h": count(heads, device=q.device).view(1, heads, 1, 1),
        "i": i.unsqueeze(-1),
        "j": j if j.ndim == 4 else j.unsqueeze(-2),
        "N": n,
        "M": m if rows is None else rows.shape[-1],
    }
    own_i = {"i"} if not spec.q_positions and offset == 0 else set()
    own_j = {"j"} if not k_map and rows is None else set()
    return names, frozenset({"b", "h"} | own_i | own_j)


def _positions(table: Tensor, q: Tensor) -> Tensor:
    """(1 | B, 1 | H, N)."""
    if table.ndim == 3:
        return repeat_heads(table, q) if table.shape[1] not in (1, q.shape[1]) else table
    return table.view(1, 1, -1) if table.ndim == 1 else table.unsqueeze(1)


def _relative(
    q: Tensor, k: Tensor, table: Tensor, where: str, side: str, names: dict[str, Any], tables: Named
) -> Tensor:
    """q_i . R[index(i, j)], or k_j . R[index(i, j)]: all products with R once, then one pick per (i, j)."""
    shape = names["s"].shape
    index = torch.as_tensor(evaluate(parse(where), names, tables), device=q.device).long()
    index = index.clamp(0, table.shape[1] - 1)
    if side == "q":
        return (q @ table.mT).gather(-1, index.expand(shape))
    if k.ndim == 5:
        return (k * table[torch.arange(table.shape[0], device=q.device).view(1, -1, 1, 1), index]).sum(-1)
    return (k @ table.mT).gather(-1, index.expand(shape).mT).mT


def _kept(
    keep: str, rows: Tensor | None, q: Tensor, names: dict[str, Any], tables: Named, whole: frozenset[str]
) -> Tensor:
    kept = torch.as_tensor(evaluate(parse(keep), names, tables, whole=whole) if keep else True, device=q.device)
    kept = kept if kept.dtype == torch.bool else kept != 0
    if rows is None:
        return kept
    return kept & (rows >= 0 if rows.ndim == 4 else (rows >= 0).unsqueeze(-2))


def _in_tiles(spec: AttendSpec, n: int, m: int, tables: Named) -> Tensor:
    """Whether the tile of key j is listed for the tile of query i (B|1, H|1, N, M)."""
    name, rows, keys = spec.tiles  # type: ignore[misc]
    listed = tables[name].long()
    tiles_q, tiles_k = -(-n // rows), -(-m // keys)
    if listed.shape[2] < tiles_q:
        found = f"tiles listed for {listed.shape[2]} x {rows} queries of {n}"
        raise Refused(found, where="attend", fits=f"{tiles_q} lists")
    beyond = torch.where((listed >= 0) & (listed < tiles_k), listed, tiles_k)
    seen = torch.zeros(*listed.shape[:3], tiles_k + 1, dtype=torch.bool, device=listed.device)
    seen = seen.scatter(-1, beyond, torch.ones_like(beyond, dtype=torch.bool))
    i, j = torch.arange(n, device=listed.device) // rows, torch.arange(m, device=listed.device) // keys
    return seen[:, :, i][..., j]
