"""`attend`: every form of attention over keys that a query can name by position, in one op.

    o_i = sum_j w_ij v_j,   w_i = normalise_j( score(scale * q_i . k_j, b, h, i, j) )  over the j with keep(b, h, i, j)

The front runs `keep`, `score`, `weight` and `after` on symbols; the op sees q, the key/value segments, the tensors that
the functions look up, and the text. Rows that keep nothing give 0 and a log-sum-exp of -inf, unless the spec has a
score for them (`empty`): a model that fills with a finite number gives such rows equal weights.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..refusal import Refused
from ..symbols import name
from .attend_asked import Asked, Predicate
from .attend_asked import Relative as Relative
from .attend_asked import Segment as Segment
from .attend_asked import Tiles as Tiles
from .attend_blocks import attend_in_blocks
from .attend_checks import check
from .attend_meaning import attend_meaning, attend_shapes
from .attend_spec import AttendSpec
from .attend_stored import described, in_numbers, is_stored
from .attend_texts import row_texts, segment_texts, source_texts, terms_of, with_terms
from .operator import Primitive
from .packed_rows import RowSpec
from .tables import Tables

attend_op = Primitive("attend", ("q", "kv*", "tables*"), attend_meaning, attend_shapes, frugal=attend_in_blocks,
                      stored=is_stored, in_numbers=in_numbers)  # fmt: skip


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
    kv_heads              which key head each query head reads; else H / Hkv neighbours share one.
    segments              further keys and values under the same normaliser; `relative`, `tiles`: see the classes.
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
    main = Segment(k, v, keep, score, k_positions, rows)
    asked = Asked(
        main, segments, normaliser, float(eps), weight, sink, after, leader, relative, tiles, kv_heads, outputs
    )
    if site is not None:
        if causal or scale is not None or align != "start" or not (q_positions is k_positions is None):
            found = "causal, scale, align or positions beside a site"
            raise Refused(found, where="attend", fits="they are the site's own; keep and score refine them")
        return site.attend(q, asked)
    tables = Tables()
    factor = operator.index(q.shape[-1]) ** -0.5 if scale is None else float(scale)  # also where sizes are open
    (kept, scored, places), *more = _segments(tables, asked, factor, causal)
    spec = AttendSpec(
        keep=kept,
        score=scored,
        k_positions=places,
        more=tuple(more),
        q_positions=tables.name_of(q_positions),
        normaliser=normaliser,
        eps=asked.eps,
        align=align,
        stored=described([*stored, *[None] * (2 * len(segments))]) if stored else (),
        outputs=tuple(outputs),
        **row_texts(tables, asked),
        **source_texts(tables, asked),
    )
    return run(q, asked.kv, tables.tensors, spec)


def _segments(tables: Tables, asked: Asked, scale: float, causal: bool) -> list[tuple[str, str, str]]:
    """Relative terms are of the main segment's keys; the scores of further ones may only ask for them."""
    terms = terms_of(asked)
    main = segment_texts(tables, asked.main, with_terms(asked) * scale, terms, causal=causal)
    return [main, *[segment_texts(tables, p, name("s") * scale, terms, causal=causal) for p in asked.segments]]


def run(q: Tensor, kv: Sequence[Tensor], tables: Sequence[Tensor], spec: AttendSpec) -> Any:
    """The op itself on a ready spec, shapes checked."""
    check(q, kv, tables, spec)
    results = attend_op(q, list(kv), list(tables), spec.text)
    return results[0] if len(spec.outputs) == 1 else tuple(results)
