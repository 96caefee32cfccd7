"""What `attend` refuses before its op is called: shapes, tables and texts that do not fit one another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..refusal import Refused, nearest
from .attend_spec import NORMALISERS, AttendSpec, count_of
from .attend_stored import rows_of, widths

_KINDS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check(q: Tensor, kv: Sequence[Tensor], tables: Sequence[Tensor], spec: AttendSpec) -> None:
    if q.ndim != 4 or any(t.ndim != 4 for t in kv):
        found = f"q of {q.ndim} and k, v of {[t.ndim for t in kv]} dimensions"
        raise Refused(found, where="attend", fits="(B, H, N, D)")
    _check_tensors(q, kv, spec)
    _check_segments(q, kv, spec)
    _check_tables(q, kv, tables, spec)
    _check_texts(spec)


def _check_segments(q: Tensor, kv: Sequence[Tensor], spec: AttendSpec) -> None:
    heads, dim, wide = q.shape[1], q.shape[-1], widths(kv, spec)
    for k, v, of_k, of_v in zip(kv[::2], kv[1::2], wide[::2], wide[1::2], strict=True):
        if of_k != dim:
            raise Refused(f"q has D={dim}, k has D={of_k}", where="attend", fits="equal dimensions of q and k")
        if k.shape[1] != v.shape[1] or (heads % k.shape[1] and not spec.kv_heads):
            found = f"{heads} heads, {k.shape[1]} key and {v.shape[1]} value heads"
            raise Refused(found, where="attend", fits="heads must be a multiple of kv_heads, or give a kv_heads table")
        if k.shape[2] != v.shape[2] or of_v != wide[1]:
            found = f"{k.shape[2]} keys, {v.shape[2]} values of D={of_v}"
            raise Refused(found, where="attend", fits=f"as many of both, values of D={wide[1]}")


def _check_tables(q: Tensor, kv: Sequence[Tensor], tables: Sequence[Tensor], spec: AttendSpec) -> None:
    for what, table, dims in _tables_of(spec):
        given = tables[int(table[1:])]
        if given.ndim not in dims:
            fits = f"{' or '.join(map(str, dims))} dimensions"
            raise Refused(f"{what} of shape {tuple(given.shape)}", where="attend", fits=fits)
    for what, table, heads_of, count in _places_of(spec, q, kv):
        _check_places(what, tables[int(table[1:])], q.shape[0], heads_of, count)
    if spec.kv_heads and tables[int(spec.kv_heads[1:])].shape[0] != q.shape[1]:
        found = f"a table of {tables[int(spec.kv_heads[1:])].shape[0]} key heads"
        raise Refused(found, where="attend", fits=f"one for each of {q.shape[1]} heads")


def _check_tensors(q: Tensor, kv: Sequence[Tensor], spec: AttendSpec) -> None:
    for t, row in zip((q, *kv), (None, *rows_of(kv, spec)), strict=True):
        if row is not None and (t.dtype != torch.uint8 or t.shape[-1] != row.bytes):
            raise Refused(f"{t.shape[-1]} of {t.dtype}", where="attend", fits=f"rows of {row.bytes} bytes")
        if row is None and t.dtype not in _KINDS:
            raise Refused(f"rows of {t.dtype}", where="attend", fits=", ".join(map(str, _KINDS)))
        if t.shape[1] == 0:
            raise Refused(f"rows of shape {tuple(t.shape)}", where="attend", fits="at least one head")
        if t.shape[0] != q.shape[0] and t.shape[0] != 1 and not (spec.group_rows and q.shape[0] % t.shape[0] == 0):
            found = f"q of a batch of {q.shape[0]}, keys or values of {t.shape[0]}"
            raise Refused(found, where="attend", fits=f"{q.shape[0]} or 1")


def _tables_of(spec: AttendSpec) -> list[tuple[str, str, tuple[int, ...]]]:
    named = [("q_positions", spec.q_positions, (1, 2, 3)), ("kv_heads", spec.kv_heads, (1,))]
    named += [("k_positions", part[2], (1, 2, 3)) for part in spec.segments]
    named += [("rows", rows, (3, 4)) for rows in spec.rows]
    named += [("a relative table", term[0], (3,)) for term in spec.relative]
    named += [("tiles", spec.tiles[0], (4,))] if spec.tiles else []
    named += [("group_rows", spec.group_rows, (2,))]
    return [entry for entry in named if entry[1]]


def _places_of(spec: AttendSpec, q: Tensor, kv: Sequence[Tensor]) -> list[tuple[str, str, tuple[int, ...], int]]:
    """Tables of one entry for each query or key: what, its name, the heads that it may have, how many entries."""
    named = [("q_positions", spec.q_positions, q)]
    named += [("k_positions", part[2], k) for part, k in zip(spec.segments, kv[::2], strict=True)]
    return [(what, places, (t.shape[1], q.shape[1]), t.shape[2]) for what, places, t in named if places]


def _check_places(what: str, given: Tensor, batch: int, heads: tuple[int, ...], count: int) -> None:
    """What is one for all has an axis of 1."""
    wanted = ((batch,), heads, (count,)) if given.ndim == 3 else ((batch,), (count,))[-given.ndim :]
    for size, fitting in zip(given.shape, wanted, strict=True):
        if all(size != fits for fits in (*fitting, 1)):
            fits = f"B = {batch}, H = {' or '.join(map(str, dict.fromkeys(heads)))}, {count} places"
            raise Refused(f"{what} of shape {tuple(given.shape)}", where="attend", fits=fits)


def _check_texts(spec: AttendSpec) -> None:
    if spec.normaliser not in NORMALISERS:
        raise Refused(f"normaliser {spec.normaliser!r}", where="attend", fits=nearest(spec.normaliser, NORMALISERS))
    if spec.align not in ("start", "end"):
        raise Refused(f"align={spec.align!r}", where="attend", fits="start or end")
    if spec.weight and spec.normaliser not in ("sum", "none"):
        raise Refused(f"a weight with normaliser {spec.normaliser!r}", where="attend", fits="sum or none")
    if spec.sink and spec.normaliser == "stick":
        raise Refused("a sink with normaliser 'stick'", where="attend", fits="softmax, grouped, sum or none")
    if bool(spec.leader) != (spec.normaliser == "grouped"):
        found = f"normaliser {spec.normaliser!r} {'with' if spec.leader else 'without'} a leader"
        raise Refused(found, where="attend", fits="normaliser='grouped' with leader(i, j)")
    if spec.empty and (spec.normaliser != "softmax" or spec.more or any(spec.rows)):
        fits = "a softmax over one segment, all keys in order"
        raise Refused("a score for queries that keep no key", where="attend", fits=fits)
    if not spec.outputs:
        raise Refused("no outputs", where="attend", fits="at least one")
    for output in spec.outputs:
        count_of(output)
