"""`scan` and `prefix` as equations: states as scans along the rows, or as sums where every row reads the last one.

KV = prefix_sum[m](FK * V, decay=...);  NUM = sum[e](FQ * KV);  KS, DEN the same over FK alone;  AV = NUM / DEN
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..primitives.prefix_spec import PrefixSpec
from ..primitives.scan_spec import ScanSpec
from ..symbol_text import parse
from ..symbols import name
from .building import Builder, Held
from .einsum import Ranks


def scan_fragment(b: Builder, text: str, groups: Sequence[Sequence[Held]]) -> list[Held]:
    (q,), (k, v), tables = groups
    spec = ScanSpec.of(text)
    p, m, e, f = q.dims[2][0], k.dims[2][0], k.dims[3][0], v.dims[3][0]
    b.same(e, q.dims[3][0])
    b.same(m, v.dims[2][0])
    if spec.causal:
        b.same(m, p)
    for mine, key, value in zip(q.dims[:2], k.dims[:2], v.dims[:2]):
        b.same_dims(mine, key)
        b.same_dims(mine, value)
    head = (*q.dims[0], *q.dims[1])
    fq = _featured(b, "FQ", spec.feature_q, q)
    fk = _featured(b, "FK", spec.feature_k, k)
    if spec.valid:
        fk = b.node("FK", (*head, m, e), f"{fk} * {_by_row(tables, spec.valid)}", at=(m, m))
    state = _table(tables, spec.state) if spec.state else None
    sums = {"KV": (f"{fk} * {v.name}", (e, f))} | ({"KS": (fk, (e,))} if spec.normaliser == "sum" else {})
    found: dict[str, str] = {}
    last: dict[str, str] = {}
    for word, (product, inner) in sums.items():
        kept = (*head, m, *inner)
        if spec.causal:
            init = f"{state.name}" if state else ""
            more = {"decay": _decay(b, spec, tables, head, m, e), "init": init, "at": (m, m)}
            found[word] = _states(b, word, kept, product, m, spec, more)
            if spec.documents and spec.read == "before":
                same = _same(tables, spec.documents)
                found[word] = b.node(word, kept, f"where({same}, {found[word]}, 0.0)", at=(m, m))
            if "state" in spec.outputs:
                whole = found[word] if spec.read == "after" else _states(b, word, kept, product, m, ScanSpec(), more)
                last[word] = b.node("LS", (*head, *inner), whole, "last", over=(m,))
        else:
            found[word] = _total(b, word, (*head, *inner), product, m, spec, tables, state)
            last[word] = found[word]
    ranks = (*head, p)
    num = b.node("NUM", (*ranks, f), f"{fq} * {found['KV']}", "reduce", monoid="sum", over=(e,))
    rows = tuple((r,) for r in ranks)
    norm = ""
    if spec.normaliser == "sum":
        norm = b.node("DEN", ranks, f"{fq} * {found['KS']}", "reduce", monoid="sum", over=(e,))
        norm = b.node("DEN", ranks, f"{norm} + {spec.eps!r}") if spec.eps else norm
    made = {}
    if "o" in spec.outputs:
        made["o"] = Held(b.node("AV", (*ranks, f), f"{num} / {norm}") if norm else num, (*rows, (f,)))
    if "norm" in spec.outputs:
        made["norm"] = Held(norm or b.node("DEN", ranks, "1.0"), rows)
    if "state" in spec.outputs:
        dims = (*((r,) for r in head), (e,), (f,))
        joined = last["KV"]
        if "KS" in last:
            joined = b.node("ST", (*head, e, f), last["KV"], "global", monoid="cat", over=(), also=(last["KS"],))
        made["state"] = Held(joined, dims)
    return [made[which] for which in spec.outputs]


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


def _decay(b: Builder, spec: ScanSpec, tables: Sequence[Held], head: Ranks, m: str, e: str) -> str:
    """The factor of each row: the decay, 0 where a document starts."""
    factor = ""
    if spec.decay:
        held = _table(tables, spec.decay)
        for own, known in zip(held.dims, (head[:1], head[1:], (m,), (e,))):
            b.same_dims(own, known)
        factor = f"exp({held.name})" if spec.log_decay else held.name
        if spec.valid:
            factor = f"where({_by_row(tables, spec.valid)} != 0, {factor}, 1.0)"
    if spec.documents:
        factor = f"where({_same(tables, spec.documents)}, {factor or '1.0'}, 0.0)"
    return parse(factor).text if factor else ""


def _total(
    b: Builder,
    word: str,
    ranks: Ranks,
    product: str,
    m: str,
    spec: ScanSpec,
    tables: Sequence[Held],
    state: Held | None,
) -> str:
    also = (_table(tables, spec.documents).name,) if spec.documents else ()
    if also:  # every row reads its own document: sums by document, looked up by row
        return b.node(word, ranks, product, "global", monoid="sums_by_document", over=(m,), also=also)
    total = b.node(word, ranks, product, "reduce", monoid="sum", over=(m,), at=(m, m))
    return b.node(word, ranks, f"{total} + {state.name}") if state else total


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
