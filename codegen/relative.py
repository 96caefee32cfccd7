"""Relative terms as tables: the products of all rows with R once, in torch, and a lookup of them in the score.

    q_i . R[index(i, j)]  is  T[b, h, n, index]  with  T = q R^T  (B, H, N, L), n the row that stands at position i

T grows with the rows of R: of clipped distances they are few. Where it is large, and belongs to queries, it is made for
some rows at a time. Its gradient is that of a learned table, and goes on from there to q (or k) and to R.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from ..compiler.boxes import bounds
from ..compiler.primitives.attend_spec import AttendSpec
from ..compiler.primitives.operator import Gradients, Groups
from ..compiler.primitives.rows import repeat_heads
from ..compiler.reach import reach
from ..compiler.symbol_eval import evaluate
from ..compiler.symbol_text import parse
from ..compiler.symbols import Expr, as_expr, build, name

_AT_ONCE = 1 << 22  # numbers of all tables of some query rows: fewer, and long rows of keys are read anew too often
_FEWEST = 192  # rows for which keys are worth being read anew


def why_not(spec: AttendSpec) -> str | None:
    """Why relative terms of a spec cannot be looked up; None where they can, or there are none."""
    if not spec.relative:
        return None
    if spec.more or any(spec.rows) or spec.q_positions or spec.k_positions or spec.kv_heads:
        return "relative terms beside segments, gathered rows, positions or a table of heads"
    if spec.after and any(word.startswith("r") for word in parse(spec.after).names):
        return "relative terms in what a weight becomes afterwards"
    return None


@lru_cache(maxsize=1024)
def looked_up(text: str, first: int | None = None) -> str:
    """The spec with lookups for its relative terms, of tables from `first` on; None: behind those that it names."""
    spec = AttendSpec.of(text)
    if not spec.relative:
        return text
    if first is None:
        first = 1 + max(int(number) for number in re.findall(r"\bt(\d+)\b", text))
    row = name("i") if spec.align == "start" else build("add", name("i"), name("N"), build("mul", name("M"), -1))
    terms = {}
    for number, (_, index, side) in enumerate(spec.relative):
        of = row if side == "q" else name("j")
        terms[f"r{number}"] = Expr("lookup", (f"t{first + number}", name("b"), name("h"), of, parse(index)))
    return replace(spec, score=parse(spec.score).replace(terms).text, relative=()).text


def as_tables(groups: Groups, text: str) -> tuple[Groups, str]:
    """The call with these products as tables behind its own."""
    spec = AttendSpec.of(text)
    if not spec.relative:
        return groups, text
    (q,), kv, tables = groups
    return [[q], list(kv), [*tables, *_products(q, kv[0], tables, spec)]], looked_up(text, len(tables))


def _products(q: Tensor, k: Tensor, tables: object, spec: AttendSpec) -> list[Tensor]:
    found = []
    for table, _, side in spec.relative:
        R = tables[int(table[1:])].float()  # type: ignore[index]
        rows = q if side == "q" else repeat_heads(k.expand(q.shape[0], *k.shape[1:]), q)
        found.append(torch.matmul(rows.float(), R.mT))
    return found


def rows_at_once(groups: Groups, text: str) -> int:
    """How many query rows have tables that a last cache holds; all rows where they cannot be made in turn."""
    (q,), _, tables = groups
    spec, rows = AttendSpec.of(text), q.shape[2]
    if spec.align != "start" or spec.tiles or any(side != "q" for _, _, side in spec.relative):
        return rows
    each = sum(q.shape[0] * q.shape[1] * tables[int(t[1:])].shape[1] for t, _, _ in spec.relative)
    return min(rows, max(_FEWEST, _AT_ONCE // max(each, 1))) if each else rows


def rooms(groups: Groups, text: str, rows: int) -> list[Tensor]:
    """Memory for the products of so many query rows."""
    (q,), _, tables = groups
    sizes = [tables[int(table[1:])].shape[1] for table, _, _ in AttendSpec.of(text).relative]
    return [torch.empty(*q.shape[:2], rows, size) for size in sizes]


def of_rows(groups: Groups, text: str, first: int, last: int, into: list[Tensor]) -> tuple[Groups, str]:
    """The call of query rows from `first` to before `last`: keys that they reach, products that these can ask for."""
    (q,), kv, tables = groups
    spec, ahead = AttendSpec.of(text), reach(text).ahead
    count = kv[0].shape[2] if ahead is None else min(kv[0].shape[2], max(0, last + ahead))
    own = q[:, :, first:last]
    box = {
        "i0": torch.tensor(first),
        "i1": torch.tensor(last - 1),
        "j0": torch.tensor(0),
        "j1": torch.tensor(count - 1),
    }
    made = [room[:, :, : last - first] for room in into]
    for T, (table, index, _) in zip(made, spec.relative, strict=True):
        _fill(T, own, tables[int(table[1:])].float(), parse(index), box)
    return [[own], [t[:, :, :count] for t in kv], [*tables, *made]], looked_up(text, len(tables))


def _fill(T: Tensor, q: Tensor, R: Tensor, index: Expr, box: Mapping[str, Tensor]) -> None:
    """q R^T (B, H, N, L), where the index of a pair in the box can be."""
    last, ends = R.shape[1] - 1, bounds(index)
    asked = ends if ends is not None and all(e.names <= box.keys() for e in ends) else (as_expr(0), as_expr(last))
    low, high = (min(max(int(evaluate(e, box, {})), 0), last) for e in asked)
    for b, h in product(range(q.shape[0]), range(q.shape[1])):
        torch.mm(q[b, h].float(), R[h % R.shape[0], low : high + 1].mT, out=T[b, h, :, low : high + 1])


def elements(groups: Groups, spec: AttendSpec, rows_q: int | None = None) -> int:
    """Of the largest of these tables."""
    (q,), kv, tables = groups
    rows = {"q": q.shape[2] if rows_q is None else rows_q, "k": kv[0].shape[2]}
    sizes = [q.shape[0] * q.shape[1] * rows[side] * tables[int(t[1:])].shape[1] for t, _, side in spec.relative]
    return max(sizes, default=0)


def through_products(
    gradients: Gradients,
    groups: Groups,
    text: str,
    results: Sequence[Tensor],
    given: Mapping[int, Tensor],
    wanted: Sequence[int],
) -> Sequence[Tensor | None] | None:
    """Gradients of a call by those of the call with tables: a table's go on to what was multiplied."""
    tensors = [t for group in groups for t in group]
    count = len(AttendSpec.of(text).relative)
    asked = [*wanted, *range(len(tensors), len(tensors) + count)]
    found = gradients(*as_tables(groups, text), results, given, asked)
    if found is None:
        return None
    of_products = {n: g for n, g in enumerate(found[len(wanted) :]) if g is not None}
    more = passed_on(groups, text, of_products)
    own = [g if g is not None else torch.zeros_like(tensors[n]) for n, g in zip(wanted, found)]
    return [g + more[n] if n in more else g for n, g in zip(wanted, own)]


def passed_on(groups: Groups, text: str, of_products: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """From the gradients of the products, by number, to those of q, k and every R, by their place in the call."""
    (q,), kv, tables = groups
    found: dict[int, Tensor] = {}
    for number, (table, _, side) in enumerate(AttendSpec.of(text).relative):
        g, at = of_products[number], int(table[1:])
        R = tables[at].float()
        rows = q if side == "q" else repeat_heads(kv[0].expand(q.shape[0], *kv[0].shape[1:]), q)
        shares = {1 + len(kv) + at: torch.matmul(g.mT, rows.float()).sum(0).sum_to_size(R.shape)}
        back = torch.matmul(g, R)  # (B, H, N or M, D)
        if side == "k":
            back = back.unflatten(1, (kv[0].shape[1], -1)).sum(2).sum_to_size(kv[0].shape)
        shares[0 if side == "q" else 1] = back
        for place, share in shares.items():
            found[place] = found[place] + share if place in found else share
    return found
