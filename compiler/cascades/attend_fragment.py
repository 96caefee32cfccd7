"""One `attend` as equations: scores and their predicate per segment, a normaliser over all of them, sums of values.

QK = sum[e](Q * K);  S = score(QK);  GM = max[m](S);  SN = exp(S - GM);  SD = sum[m](SN);  A = SN / SD
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..primitives.attend_spec import AttendSpec, count_of
from ..refusal import Refused
from ..symbol_text import parse
from ..symbols import Expr, build, name
from .building import Builder, Held
from .einsum import Ranks


@dataclass(frozen=True)
class Keys:
    """One segment: its scores S over (b, h, p, m), the values under them, what a node along its keys has to know."""

    rank: str
    scores: str
    v: Held
    more: dict[str, Any]


class Attending:
    """Writes the equations of one call into a builder."""

    def __init__(self, b: Builder, spec: AttendSpec, q: Held, kv: Sequence[Held], tables: Sequence[Held]) -> None:
        self.b, self.spec, self.q, self.tables = b, spec, self._ranked(b, q), list(tables)
        self.p = self.q.dims[2][0]
        self.row: Ranks = (*self.q.dims[0], *self.q.dims[1], self.p)
        self.kv = [(self._ranked(b, kv[k]), self._ranked(b, kv[k + 1])) for k in range(0, len(kv), 2)]
        self.offset = spec.align == "end"

    @staticmethod
    def _ranked(b: Builder, t: Held) -> Held:
        """Rows and channels have a rank also where there is one of them."""
        return Held(t.name, tuple(d if d or k < 2 else (b.rank("x"),) for k, d in enumerate(t.dims)))

    def outputs(self) -> list[Held]:
        parts = [self._segment(k) for k in range(len(self.kv))]
        weights, lse = _NORMALISERS[self.spec.normaliser](self, parts)
        if self.spec.after:
            after = parse(self.spec.after)
            weights = [
                self._wide("W", after.replace({"w": name(w)}), part) for w, part in zip(weights, parts)
            ]  # fmt: skip
        return [self._output(which, parts, weights, lse) for which in self.spec.outputs]

    # --- scores -------------------------------------------------------------------------------------------------------

    def _segment(self, k: int) -> Keys:
        (key, v), (keep, score, positions) = self.kv[k], self.spec.segments[k]
        if self.spec.rows_of(k):
            key, v = self._gathered(key, v, self.spec.rows_of(k))
        m = self._key_rank(key)
        key, v = self._along(key, m), self._along(v, m)
        e = self.q.dims[3][0]
        self.b.same(e, key.dims[3][0])
        for t in (key, v):
            for mine, theirs in zip(self.q.dims[:2], t.dims[:2]):
                self.b.same_dims(mine, theirs)
        qk = self.b.node("QK", (*self.row, m), f"{self.q.name} * {key.name}", "reduce", monoid="sum", over=(e,))
        at: dict[str, Any] = {"at": (self.p, m)}
        terms = self._relative(parse(score), m)
        told = {
            "s": name(qk),
            **self._positions(self.spec.q_positions, "i", m),
            **self._positions(positions, "j", m),
            **terms,
        }
        kept = self._indexed(parse(keep)).replace(told) if keep else None
        if self.spec.tiles and k == 0:
            listed = name(self._tiles(m))
            kept = listed if kept is None else kept & listed
        at |= {"keep": kept.text} if kept is not None else {}
        scored = self._indexed(parse(score)).replace(told)
        s = qk if scored.text == qk and not at.get("keep") else self.b.node("S", (*self.row, m), scored.text, **at)
        return Keys(m, s, v, at)

    def _key_rank(self, key: Held) -> str:
        """The rank of the keys; keys that are the queries' own rows are read along another one."""
        m = key.dims[2][0]
        return m if self.b.find(m) != self.b.find(self.p) else self.b.rank("m")

    def _along(self, t: Held, m: str) -> Held:
        own = t.dims[2][0]
        if self.b.find(own) == self.b.find(m):
            return t
        dims = (*t.dims[:2], (m,), t.dims[3])
        if self.b.find(own) != self.b.find(self.p):
            self.b.same(m, own)
            return Held(t.name, dims)
        ranks = tuple(r for dim in dims for r in dim)
        return Held(self.b.node(f"{t.name}M", ranks, t.name, "global", monoid="as", over=(own,)), dims)

    def _gathered(self, key: Held, v: Held, table: str) -> tuple[Held, Held]:
        """Rows by number: a rank of their own, reached all over the keys."""
        rows = self._table(table)
        new, own = self.b.rank("l"), key.dims[2][0]
        beside = (self.p,) if len(rows.dims) == 4 else ()
        found = []
        for t in (key, v):
            ranks = (*self.row[:-1], *beside, new, *t.dims[3])
            made = self.b.node(f"{t.name}G", ranks, t.name, "global", monoid="gather", over=(own,), also=(rows.name,))
            found.append(Held(made, (*t.dims[:2], (new,), t.dims[3])))
        return found[0], found[1]

    def _tiles(self, m: str) -> str:
        table = self._table(self.spec.tiles[0])  # type: ignore[misc]
        ranks = (*self.row, m)
        return self.b.node("TL", ranks, table.name, "global", monoid="tiles", over=table.ranks)

    def _relative(self, score: Expr, m: str) -> dict[str, Expr]:
        """q . R[index(i, j)]: rows of R picked for every pair, then a product like any other."""
        found: dict[str, Expr] = {}
        after = parse(self.spec.after).names if self.spec.after else frozenset()
        for number, (table, _, side) in enumerate(self.spec.relative):
            if f"r{number}" in score.names | after:
                rows = self._table(table)
                e = self.q.dims[3][0]
                picked = self.b.node("RP", (*self.row, m, e), rows.name, "global", monoid="pick", over=rows.ranks)
                with_ = self.q.name if side == "q" else self.kv[0][0].name
                made = self.b.node("RQ", (*self.row, m), f"{with_} * {picked}", "reduce", monoid="sum", over=(e,))
                found[f"r{number}"] = name(made)
        return found

    def _last_at_last(self, m: str) -> dict[str, Expr]:
        """The last query stands at the last key of the first segment, also where it meets those of another."""
        first = self._last()
        moved = name("i") + name("M") - name("N")
        if self.b.find(m) == self.b.find(first):
            return {"i": moved}
        return {"i": name(self.b.node("IP", (self.p,), moved.text, at=(self.p, first)))}

    def _positions(self, table: str, letter: str, m: str) -> dict[str, Expr]:
        if not table:
            return self._last_at_last(m) if letter == "i" and self.offset else {}
        held = self._table(table)
        index = {1: (letter,), 2: ("b", letter), 3: ("b", "h", letter)}[len(held.dims)]
        return {letter: Expr("lookup", (held.name, *map(name, index)))}

    def _table(self, text: str) -> Held:
        return self.tables[int(text[1:])]

    def _indexed(self, e: Expr) -> Expr:
        """Tables by the names that they have in the whole cascade; one that is computed is read as a tensor."""
        if e.op == "lookup":
            held = self._table(e.args[0])
            args = tuple(self._indexed(a) for a in e.args[1:])
            if held.name in self.b.operands:
                return Expr("lookup", (held.name, *args))
            letters = {n for a in args for n in a.names}
            ranks = tuple(r for r, letter in zip((*self.row, self._last()), "bhij") if letter in letters)
            return name(self.b.node("LT", ranks, held.name, "global", monoid="lookup", over=held.ranks))
        if e.op in ("name", "const"):
            return e
        return build(e.op, *(self._indexed(a) for a in e.args))

    def _last(self) -> str:
        return self.kv[0][0].dims[2][0]

    # --- normalisers --------------------------------------------------------------------------------------------------

    def _wide(self, word: str, e: Expr | str, part: Keys) -> str:
        text = e if isinstance(e, str) else self._indexed(e).text
        return self.b.node(word, (*self.row, part.rank), text, **part.more)

    def _over(self, word: str, text: str, part: Keys, monoid: str = "sum") -> str:
        return self.b.node(word, self.row, text, "reduce", monoid=monoid, over=(part.rank,), **part.more)

    def _row_node(self, word: str, e: Expr | str, parts: Sequence[Keys]) -> str:
        text = e if isinstance(e, str) else e.text
        return self.b.node(word, self.row, text, at=(self.p, parts[0].rank))

    def _virtual(self, parts: Sequence[Keys]) -> str:
        return self._row_node("SK", self._indexed(parse(self.spec.sink)), parts)

    def softmax(self, parts: Sequence[Keys]) -> tuple[list[str], str]:
        tops = [self._over("GM", part.scores, part, "max") for part in parts]
        tops += [self._virtual(parts)] if self.spec.sink else []
        top = tops[0]
        for other in tops[1:]:
            top = self._row_node("GM", f"maximum({top}, {other})", parts)
        raw = [self._wide("SN", f"exp({part.scores} - {top})", part) for part in parts]
        sums = [self._over("SD", r, part) for r, part in zip(raw, parts)]
        sums += [f"exp({tops[-1]} - {top})"] if self.spec.sink else []
        total = sums[0] if len(sums) == 1 else self._row_node("SD", " + ".join(sums), parts)
        return [self._wide("A", f"{r} / {total}", part) for r, part in zip(raw, parts)], f"{top} + log({total})"

    def plain(self, parts: Sequence[Keys]) -> tuple[list[str], str]:
        weight = parse(self.spec.weight or "exp(s)")
        raw = [self._wide("SN", weight.replace({"s": name(part.scores)}), part) for part in parts]
        sums = [self._over("SD", r, part) for r, part in zip(raw, parts)]
        if self.spec.sink:
            sums.append(self._indexed(weight).replace({"s": name(self._virtual(parts))}).text)
        total = sums[0] if len(sums) == 1 else self._row_node("SD", " + ".join(f"({s})" for s in sums), parts)
        lse = f"log({total})"
        if self.spec.normaliser == "none":
            return raw, lse
        divisor = f"({total} + {self.spec.eps!r})" if self.spec.eps else total
        return [self._wide("A", f"{r} / {divisor}", part) for r, part in zip(raw, parts)], lse

    def stick(self, parts: Sequence[Keys]) -> tuple[list[str], str]:
        """From the last key backwards: what later keys have left is what this one takes of."""
        broken = [self._wide("LB", f"softplus({part.scores})", part) for part in parts]
        totals = [self._over("LT", lb, part) for lb, part in zip(broken, parts)]
        weights = []
        for k, (part, lb) in enumerate(zip(parts, broken)):
            ranks = (*self.row, part.rank)
            cs = self.b.node("CS", ranks, lb, "scan", monoid="sum", over=(part.rank,), reverse=True, **part.more)
            taken = " - ".join((part.scores, cs, *totals[k + 1 :]))
            weights.append(self._wide("A", f"exp({taken})", part))
        return weights, "-1 * (" + " + ".join(totals) + ")"

    def grouped(self, parts: Sequence[Keys]) -> tuple[list[str], str]:
        """A softmax over leaders, handed on by softmaxes over followers: taken as one operation on the whole row."""
        if len(parts) > 1:
            raise Refused("groups over several segments", where="cascade", fits="one segment")
        part, ranks = parts[0], (*self.row, parts[0].rank)
        made = self.b.node("A", ranks, part.scores, "global", monoid="grouped", over=(part.rank,), **part.more)
        total = self._over("SD", f"exp({part.scores})", part)
        return [made], f"log({total})"

    # --- outputs ------------------------------------------------------------------------------------------------------

    def _output(self, which: str, parts: Sequence[Keys], weights: Sequence[str], lse: str) -> Held:
        kind, _ = count_of(which)
        row = tuple((r,) for r in self.row)
        head = row[:-1]
        first = parts[0]
        match kind:
            case "o":
                f = first.v.dims[3][0]
                for part in parts[1:]:
                    self.b.same(f, part.v.dims[3][0])
                sums = [self._summed("AV", f"{w} * {p.v.name}", p, (*self.row, f)) for w, p in zip(weights, parts)]
                total = sums[0] if len(sums) == 1 else self.b.node("AV", (*self.row, f), " + ".join(sums))
                return Held(total, (*row, (f,)))
            case "lse":
                return Held(self._row_node("LSE", lse, parts), row)
            case "logits":
                return Held(self._beside([p.scores for p in parts], parts), (*row, (first.rank,)))
            case "weights" | "slab":
                return Held(self._beside(weights, parts), (*row, (first.rank,)))
            case "entropy":
                pieces = [self._over("EN", f"-1 * {w} * log({w})", p) for w, p in zip(weights, parts)]
                return Held(pieces[0] if len(pieces) == 1 else self._row_node("EN", " + ".join(pieces), parts), row)
            case "topk":
                k = self.b.rank("l")
                rest = tuple(p.scores for p in parts[1:])
                monoid = which.replace(":", "_")
                made = self.b.node(
                    "TK", (*self.row, k), first.scores, "global", monoid=monoid, over=(first.rank,), also=rest
                )
                return Held(made, (*row, (k,)))
        return Held(self._columns(kind, parts, weights), (*head, (first.rank,)))

    def _summed(self, word: str, text: str, part: Keys, ranks: Ranks) -> str:
        return self.b.node(word, ranks, text, "reduce", monoid="sum", over=(part.rank,), **part.more)

    def _beside(self, names: Sequence[str], parts: Sequence[Keys]) -> str:
        if len(names) == 1:
            return names[0]
        ranks = (*self.row, parts[0].rank)
        return self.b.node("CAT", ranks, names[0], "global", monoid="cat", over=(), also=tuple(names[1:]))

    def _columns(self, kind: str, parts: Sequence[Keys], weights: Sequence[str]) -> str:
        part, ranks = parts[0], (*self.row[:-1], parts[0].rank)
        monoid = "max" if kind == "colmax" else "sum"
        found = self.b.node(
            "CL", ranks, self._beside(weights, parts), "reduce", monoid=monoid, over=(self.p,), **part.more
        )
        if kind == "colmean":
            count = self.b.node(
                "CN", ranks, f"1.0 + 0.0 * {part.scores}", "reduce", monoid="sum", over=(self.p,), **part.more
            )
            return self.b.node("CM", ranks, f"{found} / {count}")
        return found


_NORMALISERS = {
    "softmax": Attending.softmax,
    "sum": Attending.plain,
    "none": Attending.plain,
    "stick": Attending.stick,
    "grouped": Attending.grouped,
}


def attend_fragment(b: Builder, text: str, groups: Sequence[Sequence[Held]]) -> list[Held]:
    (q,), kv, tables = groups
    return Attending(b, AttendSpec.of(text), q, kv, tables).outputs()
