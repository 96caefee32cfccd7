"""`attend`: every form of attention over keys that a query can name by position, in one op.

    o_i = sum_j w_ij v_j,   w_i = normalise_j( score(scale * q_i . k_j, b, h, i, j) )  over the j with keep(b, h, i, j)

The front runs `keep`, `score`, `weight` and `after` on symbols; the op sees q, the key/value segments, the tensors that
the functions look up, and the text. Rows that keep nothing give 0 and a log-sum-exp of -inf, unless the spec has a
score for them (`empty`): a model that fills with a finite number gives such rows equal weights.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..refusal import Refused, nearest
from ..symbol_read import read
from ..symbol_same import sameness
from ..symbols import FALSE, TRUE, Expr, Table, build, name
from .attend_blocks import attend_in_blocks
from .attend_meaning import attend_meaning, attend_shapes
from .attend_spec import NORMALISERS, AttendSpec, count_of
from .attend_stored import described, in_numbers, is_stored, rows_of, widths
from .operator import Primitive
from .packed_rows import RowSpec

attend_op = Primitive("attend", ("q", "kv*", "tables*"), attend_meaning, attend_shapes, frugal=attend_in_blocks,
                      stored=is_stored, in_numbers=in_numbers)  # fmt: skip

Predicate = Callable[..., Any]
_KINDS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INDICES = {n: name(n) for n in ("b", "h", "i", "j", "N", "M")}
_IN_ORDER = _INDICES["j"] <= _INDICES["i"]
_MOST_READ = 4096  # functions whose texts are kept
_READ: dict[Hashable, tuple[str, list[int]]] = {}  # what functions say, and which of the tables that they name are new


@dataclass(frozen=True)
class Segment:
    """One more source of keys under the same normaliser: its own positions, predicate and score."""

    k: Tensor  # (B, Hkv, M, Dq)
    v: Tensor  # (B, Hkv, M, Dv)
    keep: Predicate | None = None
    score: Predicate | None = None
    positions: Tensor | None = None  # (M,), (B, M), (B, H, M): the logical position j of each row; else 0, 1, ...
    rows: Tensor | None = None  # (B|1, H|Hkv|1, L) or (.., N, L): the rows that stand as keys, -1 none; else all


@dataclass(frozen=True)
class Relative:
    """A term q_i . R[index(h, i, j)] (of="k": k_j . R[...]) added to q_i . k_j; indices are clamped to R's rows."""

    table: Tensor  # (H|1, L, Dq)
    index: Predicate
    of: str = "q"


@dataclass(frozen=True)
class Tiles:
    """Which tiles of keys each tile of queries sees, as lists of tile numbers, -1 for none."""

    table: Tensor  # (B|1, H|1, ceil(N / queries), L)
    queries: int
    keys: int


def attend(
    q: Tensor,  # (B, H, N, Dq)
    k: Tensor,  # (B, Hkv, M, Dq), H a multiple of Hkv
    v: Tensor,  # (B, Hkv, M, Dv)
    *,
    keep: Predicate | None = None,
    score: Predicate | None = None,
    causal: bool = False,
    scale: float | None = None,
    weight: Predicate | None = None,
    normaliser: str = "softmax",
    eps: float = 0.0,
    sink: Predicate | None = None,
    after: Predicate | None = None,
    leader: Predicate | None = None,
    relative: Sequence[Relative] = (),
    tiles: Tiles | None = None,
    kv_heads: Tensor | None = None,  # (H,): the key head of every query head
    segments: Sequence[Segment] = (),
    q_positions: Tensor | None = None,  # (N,), (B, N) or (B, H, N)
    k_positions: Tensor | None = None,
    rows: Tensor | None = None,
    stored: Sequence[RowSpec | None] = (),  # of k and of v
    align: str = "start",
    site: Any = None,
    outputs: Sequence[str] = ("o",),
) -> Any:
    """Attention of q over k, v. Returns the output tensor, or a tuple where several `outputs` are asked for.

    keep(b, h, i, j)      which keys a query sees; `causal` adds j <= i, in every segment.
    score(s, b, h, i, j)  the logit from s = scale * q.k (scale: Dq ** -0.5), relative terms included; r0, r1, ... are
                          these terms themselves.
    normaliser            "softmax"; "sum": divided by the sum + eps; "none"; "stick": stick-breaking from the most
                          recent key backwards (keep j <= i, or j < i without the own key); "grouped": see `leader`.
    weight(s, b, h, i)    the unnormalised weight where it is not exp, with "sum" or "none".
    sink(b, h, i)         the logit of a virtual key whose value is 0.
    after(w, b, h, i, j)  the normalised weight, changed before it meets v.
    leader(b, h, i, j)    two-level softmax: the key that speaks for key j's group. One softmax runs over the leaders;
                          each hands its weight to its followers by a softmax among them, or keeps it without any.
    rows, k_positions     as in `Segment`: which rows of k, v stand as keys, and where.
    stored                k, v are rows of bytes as `packed_rows` makes them, read as the numbers that these stand for.
    align="end"           the last query stands at the last key (decoding): i counts from M - N.
    site                  a live site: what its own score and mask had (causal, padding, bias, softcap, sinks, query
                          offset, scale) is kept; `keep`, `score` refine it.
    outputs               o, lse, logits, weights; of columns colsum, colmean (over queries that keep it), colmax;
                          of rows entropy, "topk:8" (columns of the largest logits, lowest first among equals, -1 for
                          none); "slab:16" (weights of the last 16 rows, 0 above the first). Columns count the keys of
                          all segments in order.
    """
    if site is not None:
        if causal or scale is not None or align != "start" or not (q_positions is k_positions is None):
            found = "causal, scale, align or positions beside a site"
            raise Refused(found, where="attend", fits="they are the site's own; keep and score refine them")
        return site.attend(q, k, v, keep=keep, score=score, weight=weight, normaliser=normaliser, eps=eps, sink=sink,
                           after=after, leader=leader, relative=relative, tiles=tiles, kv_heads=kv_heads, rows=rows,
                           segments=segments, outputs=outputs)  # fmt: skip
    tables = Tables()
    factor = (
        operator.index(q.shape[-1]) ** -0.5 if scale is None else float(scale)
    )  # a number, also where sizes are open
    main = Segment(k, v, keep, score, k_positions, rows)
    texts = [segment_texts(tables, main, with_terms(relative) * factor, causal, len(relative))]
    texts += [segment_texts(tables, part, name("s") * factor, causal, len(relative)) for part in segments]
    spec = AttendSpec(
        keep=texts[0][0],
        score=texts[0][1],
        k_positions=texts[0][2],
        more=tuple(texts[1:]),
        q_positions=tables.name_of(q_positions),
        normaliser=normaliser,
        eps=float(eps),
        align=align,
        stored=described([*stored, *[None] * (2 * len(segments))]) if stored else (),
        outputs=tuple(outputs),
        **row_texts(tables, weight, sink, after, len(relative)),
        **source_texts(tables, (main, *segments), relative, tiles, kv_heads, leader),
    )
    kv = [t for part in (main, *segments) for t in (part.k, part.v)]
    return run(q, kv, tables.tensors, spec)


def run(q: Tensor, kv: Sequence[Tensor], tables: Sequence[Tensor], spec: AttendSpec) -> Any:
    """The op itself on a ready spec, shapes checked."""
    _check(q, kv, tables, spec)
    results = attend_op(q, list(kv), list(tables), spec.text)
    return results[0] if len(spec.outputs) == 1 else tuple(results)


class Tables:
    """The tensors that a spec's texts look up, named t0, t1, ... in order of first use."""

    def __init__(self, tensors: Sequence[Tensor] = ()) -> None:
        self.tensors: list[Tensor] = list(tensors)

    def name_of(self, tensor: Tensor | None) -> str:
        if tensor is None:
            return ""
        for index, known in enumerate(self.tensors):
            if known is tensor:
                return f"t{index}"
        self.tensors.append(tensor)
        return f"t{len(self.tensors) - 1}"

    def settle(self, e: Expr) -> Expr:
        """The expression with its live tables replaced by their names here."""
        if e.op == "lookup":
            which = self.name_of(e.args[0].tensor) if isinstance(e.args[0], Table) else e.args[0]
            return Expr("lookup", (which, *(self.settle(a) for a in e.args[1:])))
        if e.op in ("name", "const"):
            return e
        return build(e.op, *(self.settle(a) for a in e.args))

    def text(self, function: Predicate | None, known: Mapping[str, Expr], what: str, beside: Expr | None = None) -> str:
        """What a function says, in names of these tables, and what holds beside it.

        Functions that say the same are read once.
        """
        if function is None:
            return "" if beside is None else beside.text
        live: list[Table] = []
        key = None if torch.compiler.is_compiling() else sameness(function, live)
        if key is None:
            return self._read(function, known, what, beside)
        had, places = len(self.tensors), tuple([self._place(each.tensor) for each in live])
        names = tuple([(n, e.text) for n, e in known.items()])
        whole = key, names, None if beside is None else beside.text, had, places
        kept = _READ.get(whole)
        if kept is not None:
            text, order = kept
            self.tensors += [live[n].tensor for n in order]
            return text
        text = self._read(function, known, what, beside)
        order = [n for t in self.tensors[had:] for n, each in enumerate(live) if each.tensor is t]
        if len(order) == len(self.tensors) - had:  # none that the function made for itself
            if len(_READ) >= _MOST_READ:
                _READ.clear()
            _READ[whole] = text, order
        return text

    def _read(self, function: Predicate, known: Mapping[str, Expr], what: str, beside: Expr | None) -> str:
        found = read(function, known, what=what)
        return self.settle(found if beside is None else found & beside).text

    def _place(self, tensor: Tensor) -> int:
        return next((n for n, known in enumerate(self.tensors) if known is tensor), -1)


def with_terms(relative: Sequence[Relative]) -> Expr:
    """q.k with the relative terms beside it."""
    total = name("s")
    for number in range(len(relative)):
        total = total + name(f"r{number}")
    return total


def segment_texts(tables: Tables, part: Segment, scaled: Expr, causal: bool, terms: int = 0) -> tuple[str, str, str]:
    keep = _predicate(tables.text(part.keep, _INDICES, "keep", _IN_ORDER if causal else None))
    known = {"s": scaled, **_INDICES, **_terms(terms)}
    score = scaled.text if part.score is None else tables.text(part.score, known, "score")
    return keep, score, tables.name_of(part.positions)


def row_texts(
    tables: Tables, weight: Predicate | None, sink: Predicate | None, after: Predicate | None, terms: int
) -> dict[str, Any]:
    rows = {n: _INDICES[n] for n in ("b", "h", "i")}
    return {
        "weight": tables.text(weight, {"s": name("s"), **rows}, "weight"),
        "sink": tables.text(sink, rows, "sink"),
        "after": tables.text(after, {"w": name("w"), **_INDICES, **_terms(terms)}, "after"),
    }


def source_texts(
    tables: Tables,
    parts: Sequence[Segment],
    relative: Sequence[Relative],
    tiles: Tiles | None,
    kv_heads: Tensor | None,
    leader: Predicate | None,
) -> dict[str, Any]:
    """What a spec says beyond scores: gathered rows, relative terms, tile lists, key heads, groups."""
    rows = tuple(tables.name_of(part.rows) for part in parts)
    unknown = [term.of for term in relative if term.of not in ("q", "k")]
    if unknown:
        raise Refused(f"a relative term of {unknown[0]!r}", where="attend", fits="q or k")
    if tiles is not None and (parts[0].rows is not None or tiles.queries < 1 or tiles.keys < 1):
        found = f"tiles of {tiles.queries} x {tiles.keys}" + (
            " over gathered rows" if parts[0].rows is not None else ""
        )
        raise Refused(found, where="attend", fits="tiles of at least 1 x 1 over keys in order")
    if leader is not None and (parts[0].rows is not None or parts[0].positions is not None):
        raise Refused("groups over gathered or moved keys", where="attend", fits="keys in order, j = 0, 1, ...")
    return {
        "rows": rows if any(rows) else (),
        "relative": tuple(
            (tables.name_of(term.table), tables.text(term.index, _INDICES, "index"), term.of) for term in relative
        ),
        "tiles": () if tiles is None else (tables.name_of(tiles.table), tiles.queries, tiles.keys),
        "kv_heads": tables.name_of(kv_heads),
        "leader": tables.text(leader, _INDICES, "leader"),
    }


def _terms(count: int) -> dict[str, Expr]:
    return {f"r{number}": name(f"r{number}") for number in range(count)}


def _predicate(keep: str) -> str:
    if keep == FALSE.text:
        raise Refused("a predicate that keeps no key", where="attend")
    return "" if keep == TRUE.text else keep


def _check(q: Tensor, kv: Sequence[Tensor], tables: Sequence[Tensor], spec: AttendSpec) -> None:
    if q.ndim != 4 or any(t.ndim != 4 for t in kv):
        found = f"q of {q.ndim} and k, v of {[t.ndim for t in kv]} dimensions"
        raise Refused(found, where="attend", fits="(B, H, N, D)")
    _check_tensors(q, kv, spec)
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
    for what, table, dims in _tables_of(spec):
        given = tables[int(table[1:])]
        if given.ndim not in dims:
            fits = f"{' or '.join(map(str, dims))} dimensions"
            raise Refused(f"{what} of shape {tuple(given.shape)}", where="attend", fits=fits)
    for what, table, heads_of, count in _places_of(spec, q, kv):
        _check_places(what, tables[int(table[1:])], q.shape[0], heads_of, count)
    if spec.kv_heads and tables[int(spec.kv_heads[1:])].shape[0] != heads:
        found = f"a table of {tables[int(spec.kv_heads[1:])].shape[0]} key heads"
        raise Refused(found, where="attend", fits=f"one for each of {heads} heads")
    _check_texts(spec)


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
