"""`scan` and `prefix` as equations: states as scans along the rows, or as sums where every row reads the last one.

KV = prefix_sum[m](FK * V, decay=...);  NUM = sum[e](FQ * KV);  KS, DEN the same over FK alone;  AV = NUM / DEN
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..primitives.prefix_spec import PrefixSpec
from ..primitives.scan_spec import ScanSpec
from ..symbol_text import parse
from ..symbols import name
from .building import Builder, Held
from .einsum import Ranks


def scan_fragment(b: Builder, text: str, groups: Sequence[Sequence[Held]]) -> list[Held]:
    (q,), (k, v), tables = groups
    at = _scan_of(b, ScanSpec.of(text), q, k, v, tables)
    spec = at.spec
    fq = _featured(b, "FQ", spec.feature_q, q)
    fk = _featured(b, "FK", spec.feature_k, k)
    if spec.valid:
        fk = b.node("FK", (*at.head, at.m, at.e), f"{fk} * {_by_row(tables, spec.valid)}", at=(at.m, at.m))
    sums = {"KV": _summed(at, "KV", f"{fk} * {v.name}", (at.e, at.f))}
    if spec.normaliser == "sum":
        sums["KS"] = _summed(at, "KS", fk, (at.e,))
    ranks = (*at.head, at.p)
    num = b.node("NUM", (*ranks, at.f), f"{fq} * {sums['KV'].read}", "reduce", monoid="sum", over=(at.e,))
    norm = _normaliser(at, fq, sums["KS"].read) if "KS" in sums else ""
    rows = tuple((r,) for r in ranks)
    made = {}
    if "o" in spec.outputs:
        made["o"] = Held(b.node("AV", (*ranks, at.f), f"{num} / {norm}") if norm else num, (*rows, (at.f,)))
    if "norm" in spec.outputs:
        made["norm"] = Held(norm or b.node("DEN", ranks, "1.0"), rows)
    if "state" in spec.outputs:
        made["state"] = _state_after(at, sums)
    return [made[which] for which in spec.outputs]


@dataclass(frozen=True)
class _Scan:
    """One scan in writing: what it is, and how its ranks are called."""

    b: Builder
    spec: ScanSpec
    tables: Sequence[Held]
    head: Ranks
    p: str  # queries
    m: str  # keys
    e: str  # channels of keys
    f: str  # channels of values

    @property
    def state(self) -> Held | None:
        return _table(self.tables, self.spec.state) if self.spec.state else None


@dataclass(frozen=True)
class _Sum:
    """A sum over rows: as each query reads it, and as it is after the last row."""

    read: str
    last: str = ""


def _scan_of(b: Builder, spec: ScanSpec, q: Held, k: Held, v: Held, tables: Sequence[Held]) -> _Scan:
    p, m, e, f = q.dims[2][0], k.dims[2][0], k.dims[3][0], v.dims[3][0]
    b.same(e, q.dims[3][0])
    b.same(m, v.dims[2][0])
    if spec.causal:
        b.same(m, p)
    for mine, key, value in zip(q.dims[:2], k.dims[:2], v.dims[:2]):
        b.same_dims(mine, key)
        b.same_dims(mine, value)
    return _Scan(b, spec, tables, (*q.dims[0], *q.dims[1]), p, m, e, f)


def _summed(at: _Scan, word: str, product: str, inner: Ranks) -> _Sum:
    b, spec = at.b, at.spec
    if not spec.causal:
        total = _total(at, word, product, inner)
        return _Sum(total, total)
    kept = (*at.head, at.m, *inner)
    init = at.state.name if at.state else ""
    more = {"decay": _decay(at), "init": init, "at": (at.m, at.m)}
    found = _states(b, word, kept, product, at.m, spec, more)
    if spec.documents and spec.read == "before":
        same = _same(at.tables, spec.documents)
        found = b.node(word, kept, f"where({same}, {found}, 0.0)", at=(at.m, at.m))
    if "state" not in spec.outputs:
        return _Sum(found)
    whole = found if spec.read == "after" else _states(b, word, kept, product, at.m, ScanSpec(), more)
    return _Sum(found, b.node("LS", (*at.head, *inner), whole, "last", over=(at.m,)))


def _normaliser(at: _Scan, fq: str, keys: str) -> str:
    ranks = (*at.head, at.p)
    norm = at.b.node("DEN", ranks, f"{fq} * {keys}", "reduce", monoid="sum", over=(at.e,))
    return at.b.node("DEN", ranks, f"{norm} + {at.spec.eps!r}") if at.spec.eps else norm


def _state_after(at: _Scan, sums: Mapping[str, _Sum]) -> Held:
    """The state that a later call starts from: the normaliser's sum is one more column."""
    joined = sums["KV"].last
    if "KS" in sums:
        also = (sums["KS"].last,)
        joined = at.b.node("ST", (*at.head, at.e, at.f), joined, "global", monoid="cat", over=(), also=also)
    return Held(joined, (*((r,) for r in at.head), (at.e,), (at.f,)))


def _featured(b: Builder, word: str, text: str, t: Held) -> str:
    return b.node(word, t.ranks, parse(text).replace({"x": name(t.name)}).text) if text else t.name


def _table(tables: Sequence[Held], text: str) -> Held:
    return tables[int(text[1:])]


def _by_row(tables: Sequence[Held], text: str) -> str:
    held = _table(tables, text)
    return f"{held.name}[{'j' if len(held.dims) == 1 else 'b, j'}]"


def _same(tables: Sequence[Held], text: str, beside: str = "maximum(j - 1, 0)") -> str:
    """Whether a row and the one before it (in the order of the scan) are of one document."""
    held = _table(tables, text)
    first = "" if len(held.dims) == 1 else "b, "
    return f"{held.name}[{first}j] == {held.name}[{first}{beside}]"


def _states(b: Builder, word: str, ranks: Ranks, product: str, m: str, spec: ScanSpec, more: dict[str, Any]) -> str:
    return b.node(word, ranks, product, "scan", monoid="sum", over=(m,), before=spec.read == "before", **more)


def _decay(at: _Scan) -> str:
    """The factor of each row: the decay, 0 where a document starts."""
    spec, factor = at.spec, ""
    if spec.decay:
        held = _table(at.tables, spec.decay)
        for own, known in zip(held.dims, (at.head[:1], at.head[1:], (at.m,), (at.e,))):
            at.b.same_dims(own, known)
        factor = f"exp({held.name})" if spec.log_decay else held.name
        if spec.valid:
            factor = f"where({_by_row(at.tables, spec.valid)} != 0, {factor}, 1.0)"
    if spec.documents:
        factor = f"where({_same(at.tables, spec.documents)}, {factor or '1.0'}, 0.0)"
    return parse(factor).text if factor else ""


def _total(at: _Scan, word: str, product: str, inner: Ranks) -> str:
    """Without an order of the rows all of them read one sum, or that of their document."""
    b, ranks, over = at.b, (*at.head, *inner), (at.m,)
    if at.spec.documents:  # every row reads its own document: sums by document, looked up by row
        also = (_table(at.tables, at.spec.documents).name,)
        return b.node(word, ranks, product, "global", monoid="sums_by_document", over=over, also=also)
    total = b.node(word, ranks, product, "reduce", monoid="sum", over=over, at=(at.m, at.m))
    return b.node(word, ranks, f"{total} + {at.state.name}") if at.state else total


def prefix_fragment(b: Builder, text: str, groups: Sequence[Sequence[Held]]) -> list[Held]:
    x, tables = groups
    spec = PrefixSpec.of(text)
    m = x[0].dims[2][0]
    for t in x[1:]:
        for own, other in zip(x[0].dims[:3], t.dims[:3]):
            b.same_dims(own, other)
    head: Ranks = (*x[0].dims[0], *x[0].dims[1], m)
    scan: dict[str, Any] = {"over": (m,), "reverse": spec.reverse, "at": (m, m)}
    same = _same_document(spec, tables)
    if spec.monoid in ("sum", "max") and not same:
        return [Held(b.node("PX", x[0].ranks, x[0].name, "scan", monoid=spec.monoid, **scan), x[0].dims)]
    if spec.monoid == "max" or (spec.monoid == "softmax" and same):
        made = b.node("PX", x[-1].ranks, x[-1].name, "global", monoid=f"{spec.monoid}_by_document", over=(m,))
        return [Held(made, x[-1].dims), Held(made, x[0].dims)][: 2 if spec.monoid == "softmax" else 1]
    if spec.monoid != "softmax":
        decay = x[0].name if spec.monoid == "affine" else "1.0"
        decay = f"where({same}, {decay}, 0.0)" if same else decay
        return [Held(b.node("PX", x[-1].ranks, x[-1].name, "scan", monoid="sum", decay=decay, **scan), x[-1].dims)]
    return _prefix_softmax(b, x[0], x[1], head, scan)


def _same_document(spec: PrefixSpec, tables: Sequence[Held]) -> str:
    return _same(tables, spec.documents, "j + 1" if spec.reverse else "maximum(j - 1, 0)") if spec.documents else ""


def _prefix_softmax(b: Builder, logits: Held, v: Held, head: Ranks, scan: dict[str, Any]) -> list[Held]:
    top = b.node("RM", head, logits.name, "scan", monoid="max", **scan)
    before = b.node("RB", head, logits.name, "scan", monoid="max", before=True, **scan)
    moved = b.node("PRM", head, f"exp({before} - {top})")
    raw = b.node("SN", head, f"exp({logits.name} - {top})")
    total = b.node("RD", head, raw, "scan", monoid="sum", decay=moved, **scan)
    summed = b.node("RNV", v.ranks, f"{raw} * {v.name}", "scan", monoid="sum", decay=moved, **scan)
    o = b.node("AV", v.ranks, f"{summed} / {total}")
    return [Held(o, v.dims), Held(b.node("LSE", head, f"{top} + log({total})"), logits.dims)]
