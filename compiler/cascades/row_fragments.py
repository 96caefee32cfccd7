"""The primitives that move or join rows, as equations: merge, group, reduce_kv, route, gather, scatter, chosen."""

from __future__ import annotations

from collections.abc import Sequence

from ..primitives.merge import MergeSpec
from ..primitives.route import RouteSpec
from .building import Builder, Held

Groups = Sequence[Sequence[Held]]


def merge_fragment(b: Builder, text: str, groups: Groups) -> list[Held]:
    """A softmax over the parts: GM is the largest lse, every part is multiplied by exp(lse - GM)."""
    parts, logs = groups
    for other in parts[1:]:
        for own, its in zip(parts[0].dims, other.dims):
            b.same_dims(own, its)
    for part, log in zip(parts, logs):
        for own, its in zip(part.dims, log.dims):
            b.same_dims(own, its)
    o, lse = parts[0], logs[0]
    if MergeSpec.of(text).by == "sum":
        total = b.node("AV", o.ranks, " + ".join(p.name for p in parts))
        return [Held(total, o.dims), Held(b.node("SD", lse.ranks, " + ".join(x.name for x in logs)), lse.dims)]
    top = lse.name
    for log in logs[1:]:
        top = b.node("GM", lse.ranks, f"maximum({top}, {log.name})")
    total = b.node("SD", lse.ranks, " + ".join(f"exp({x.name} - {top})" for x in logs))
    summed = " + ".join(f"exp({x.name} - {top}) * {p.name}" for p, x in zip(parts, logs))
    merged = b.node("AV", o.ranks, f"({summed}) / {total}")
    return [Held(merged, o.dims), Held(b.node("LSE", lse.ranks, f"{top} + log({total})"), lse.dims)]


def reduce_fragment(b: Builder, text: str, groups: Groups) -> list[Held]:
    """K1 = sum[m](SH * K) / MS, where SH[g, m] is the share of row m in group g."""
    (k,), (v,), (index,), tables = groups
    m, g, head = k.dims[2][0], b.rank("g"), (*k.dims[0], *k.dims[1])
    also = tuple(t.name for t in tables)
    share = b.node("SH", (*head, g, m), index.name, "global", monoid="shares", over=index.ranks, also=also)
    mass = b.node("MS", (*head, g), share, "reduce", monoid="sum", over=(m,))
    found = []
    for t in (k, v):
        b.same(m, t.dims[2][0])
        summed = b.node(f"{t.name}S", (*head, g, *t.dims[3]), f"{share} * {t.name}", "reduce", monoid="sum", over=(m,))
        mean = b.node(f"{t.name}R", (*head, g, *t.dims[3]), f"{summed} / {mass}")
        found.append(Held(mean, (*t.dims[:2], (g,), t.dims[3])))
    return [*found, Held(mass, (*k.dims[:2], (g,)))]


def route_fragment(b: Builder, text: str, groups: Groups) -> list[Held]:
    (scores,), valid = groups
    last, new = scores.dims[-1], b.rank("l")
    ranks = tuple(r for dim in scores.dims[:-1] for r in dim)
    also = tuple(v.name for v in valid)
    monoid = f"topk_{RouteSpec.of(text).k}"
    values = b.node("TV", (*ranks, new), scores.name, "global", monoid=monoid, over=last, also=also)
    index = b.node("TK", (*ranks, new), scores.name, "global", monoid=f"arg{monoid}", over=last, also=also)
    dims = (*scores.dims[:-1], (new,))
    return [Held(values, dims), Held(index, dims)]


def group_fragment(b: Builder, text: str, groups: Groups) -> list[Held]:
    (x,), (index,), tables = groups
    return [_picked(b, "GR", x, index, tables), _picked(b, "GH", x, index, tables, flags=True)]


def _picked(b: Builder, word: str, x: Held, index: Held, tables: Sequence[Held], flags: bool = False) -> Held:
    """Rows by number: slots of groups, each reached anywhere along the rows."""
    slots = tuple((b.rank("g"),) for _ in range(2))
    dims = (*x.dims[:2], *slots, *(() if flags else (x.dims[3],)))
    ranks = tuple(r for dim in dims for r in dim)
    also = (index.name, *(t.name for t in tables))
    return Held(b.node(word, ranks, x.name, "global", monoid="group", over=x.dims[2], also=also), dims)


def gather_fragment(b: Builder, text: str, groups: Groups) -> list[Held]:
    (x,), (index,) = groups
    dims = (*x.dims[:2], index.dims[-1] or (b.rank("l"),), x.dims[3])
    ranks = tuple(r for dim in dims for r in dim)
    return [Held(b.node("GA", ranks, x.name, "global", monoid="gather", over=x.dims[2], also=(index.name,)), dims)]


def scatter_fragment(b: Builder, text: str, groups: Groups) -> list[Held]:
    (x,), (index,), (into,) = groups
    also = (index.name, into.name)
    return [Held(b.node("SC", into.ranks, x.name, "global", monoid="scatter", over=x.dims[2], also=also), into.dims)]


def chosen_fragment(b: Builder, text: str, groups: Groups) -> list[Held]:
    """CH = sum[c](X * CW), where CW[r, s, c, a] is the matrix that row r has chosen."""
    (x,), (which,), (w,) = groups
    for own, its in zip(x.dims[:1] + x.dims[1:], which.dims[:1] + w.dims[1:2], strict=True):
        b.same_dims(own, its)
    head, inner, out = (*x.dims[0], *which.dims[1]), x.dims[1], w.dims[2]
    matrix = b.node("CW", (*head, *inner, *out), w.name, "global", monoid="gather", over=w.dims[0], also=(which.name,))
    summed = b.node("CH", (*head, *out), f"{x.name} * {matrix}", "reduce", monoid="sum", over=inner)
    return [Held(summed, (x.dims[0], which.dims[1], out))]
