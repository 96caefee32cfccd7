"""The gradient of `attend` as Triton: a kernel over query rows and one over tiles of keys, by differentiation alone.

w = W(s, L)     the weight, by its score and one number kept of the row      g = do . v    delta = do . o
ds = W'(s, L) (g - delta)   where a row was divided by its sum, else W'(s, L) g
dq = sum_j ds score'(q.k) k_j      dk = sum_i ds score'(q.k) q_i      dv = sum_i w do_i
where X_j sums u(s) from the last key to j: ds_j = w_j g_j + u'(s_j) (what the keys behind j have of w . g - delta)
dt = sum ds d score/dt + (g - delta) dW/dt      a sink is one more key of each row, with g = 0
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from ...compiler.spans import Reached, spans
from ...compiler.symbol_slope import slope, slope_by
from ...compiler.symbol_text import parse
from ...compiler.symbols import Expr
from .attend import EVERYWHERE, SIZES, Attend, listed, refusal
from .folding import Row, numbered
from .printer import triton_text
from .skeleton import filled, text_of
from .walking import Walk, walked, walked_list

_KEY_SIZES = ("D", "DP", "E", "EP", "BM", "WIDE", "PRECISION")


@dataclass(frozen=True)
class Looked:
    """One lookup whose table learns: what its gradient is summed over before it is stored."""

    number: int
    at: Expr  # the lookup
    inside: str  # what it is looked up for: score, weight, sink

    @property
    def indices(self) -> frozenset[str]:
        return frozenset(n for a in self.at.args[1:] for n in a.names)

    @property
    def by_row(self) -> bool:
        """Whether all keys of a row meet one element."""
        return "j" not in self.indices


@dataclass(frozen=True)
class Gradient:
    """The kernels of one spec's gradient; `learned`: the tables whose gradients are wanted."""

    of: Attend
    learned: tuple[int, ...] = ()

    @cached_property
    def source(self) -> str:
        return "".join([text_of("functions"), self._tile(), self._queries()])

    @cached_property
    def source_of_keys(self) -> str:
        return "".join([text_of("functions"), self._tile_of_queries(), self._keys()])

    @cached_property
    def row(self) -> Row:
        return self.of.folding.row

    @cached_property
    def score(self) -> Expr:
        return parse(self.of.spec.score)

    @cached_property
    def weight(self) -> Expr:
        return numbered(self.row.weight)

    @cached_property
    def lookups(self) -> tuple[Looked, ...]:
        """Lookups of learned tables, each once in what it is looked up for."""
        found = {}
        for inside, e in (("score", self.score), ("weight", self.weight), ("sink", self.row.virtual)):
            for at in () if e is None else e.walk():
                if at.op == "lookup" and int(at.args[0][1:]) in self.learned:
                    found[inside, at.text] = Looked(int(at.args[0][1:]), at, inside)
        return tuple(found.values())

    @property
    def grads(self) -> list[str]:
        """Arguments of the gradients of tables."""
        axes = self.of.tables.split()
        return [
            word
            for n in sorted({looked.number for looked in self.lookups})
            for word in (f"d{n}", *(f"d{n}_step{axis}" for axis in range(int(axes[n][1:]))))
        ]

    # --- statements ---------------------------------------------------------------------------------------------------

    def _weight(self, names: dict[str, str], kept: str, when: str = "") -> list[str]:
        """From the products q . k to the weights, -inf or 0 where nothing is kept; `when`: a tile may be whole."""
        folding = self.of.folding
        hidden = 's = tl.where(kept, s, float("-inf"))' if folding.hidden else "w = tl.where(kept, w, 0.0)"
        lines = [f"s = {folding.score(self.score, names | {'s': 'raw'})}", *_under(when, f"kept = {kept}")]
        weight = f"w = {self._printed(self.row.weight, names)}"
        if not folding.hidden:
            return [*lines, weight, *_under(when, hidden)]
        return [*lines, *_under(when, hidden), *self._summed(names), weight]

    def _summed(self, names: dict[str, str]) -> list[str]:
        """What is summed from the last key on."""
        if self.row.scan is None:
            return []
        return [f"u = {self._printed(self.row.scan, names)}", f"X = {self._from_behind('run_x', 'u', names)}"]

    @staticmethod
    def _from_behind(start: str, word: str, names: dict[str, str]) -> str:
        """Sums of a tile's numbers from the last key on, each with its own; keys are its columns or its rows."""
        beside = names["delta"].removeprefix("delta")
        return f"{start}{beside} + tl.cumsum({word}, {int(beside == '[:, None]')}, reverse=True)"

    def _printed(self, e: Expr, names: dict[str, str]) -> str:
        return self.of.folding.printed(e, names)

    def _slope(self, names: dict[str, str], when: str = "") -> list[str]:
        """From weights and g to the gradients of the scores."""
        up = self.row.slope
        text = "w" if up.text == self.row.weight.text else self._printed(up, names)
        hidden = [] if self.of.folding.hidden else _under(when, "up = tl.where(kept, up, 0.0)")
        lines = [f"up = {text} * {self._against(names)}", *hidden]
        if self.row.scan is None:
            return lines
        by = self._printed(slope(self.row.scan, "s"), names)
        behind = f"({self._from_behind('run_r', 'wg', names)} - wg - {names['delta']})"
        return ["wg = w * g", *lines, f"up += {by} * {behind}"]

    @property
    def scans(self) -> bool:
        return self.row.scan is not None

    @property
    def _edges(self) -> list[str]:
        """Arguments of what keys behind a tile have come to, of every row and tile."""
        return ["EDGE_X", "EDGE_R", "EDGES"] if self.scans else []

    def _against(self, names: dict[str, str]) -> str:
        """The gradient of a weight: what the row's own number has to do with it taken away."""
        return f"(g - {names['delta']})" if self.row.divided else "g"

    def _of_products(self, names: dict[str, str]) -> str:
        own = triton_text(slope(self.score, "s"), "f", names | {"s": "raw"}, tables=self.of.kinds)
        return f"ds = up * {own}"

    def _of_tables(self, names: dict[str, str], when: str = "") -> list[str]:
        """What learned tables gather: a row's share in a sum of its own, a pair's at once."""
        lines: list[str] = []
        for place, looked in enumerate(self.lookups):
            if looked.inside == "weight":
                lines.append(f"share = {self._against(names)} * {self._by(looked, self.weight, names)}")
                lines += _under(when, "share = tl.where(kept, share, 0.0)")
                lines.append(f"sum{place} += tl.sum(share, 1)")
            elif looked.inside == "score":
                share = f"up * {self._by(looked, self.score, names | {'s': 'raw'})}"
                if looked.by_row:
                    lines.append(f"sum{place} += tl.sum({share}, 1)")
                else:
                    pairs = "here[None, :] & inside[:, None] & (up != 0.0)"
                    lines.append(f"tl.atomic_add({self._target(looked, names)}, {share}, mask={pairs}, sem='relaxed')")
        return lines

    def _of_virtual(self) -> Iterator[str]:
        """The key that no row of v belongs to, once for every row."""
        if self.row.virtual is None or all(looked.inside == "score" for looked in self.lookups):
            return
        yield f"s = whole({self.of.folding.score(self.row.virtual)}, BM)"
        up = triton_text(slope(self.weight, "s"), "f", tables=self.of.kinds, powers=self.of.folding.powers)
        yield f"up = -{up} * delta"
        for place, looked in enumerate(self.lookups):
            if looked.inside == "sink":
                yield f"sum{place} += up * {self._by(looked, self.row.virtual, {})}"
            elif looked.inside == "weight":
                yield f"sum{place} -= delta * {self._by(looked, self.weight, {})}"

    def _by(self, looked: Looked, e: Expr, names: dict[str, str]) -> str:
        """The derivative of an expression by what was looked up in it."""
        return triton_text(slope_by(e, looked.at), "f", names, tables=self.of.kinds)

    def _target(self, looked: Looked, names: dict[str, str]) -> str:
        n = looked.number
        steps = [
            f"at({triton_text(index, 'i', names, tables=self.of.kinds)}, t{n}_size{axis}) * d{n}_step{axis}"
            for axis, index in enumerate(looked.at.args[1:])
        ]
        return f"d{n} + {' + '.join(steps)}"

    @property
    def _guarded(self) -> str:
        """A row that kept nothing has no number of its own."""
        return 'tl.where(L == float("-inf"), 0.0, L)' if self.of.folding.powers else "tl.where(L == 0.0, 1.0, L)"

    @property
    def keeps(self) -> bool:
        return self.row.kept is not None

    # --- over rows of queries -----------------------------------------------------------------------------------------

    @property
    def sums(self) -> str:
        own = [f"sum{k}" for k, looked in enumerate(self.lookups) if looked.by_row]
        return ", ".join(["dq", *own, *(["run_x", "run_r"] if self.scans else [])])

    def _tile(self) -> str:
        names = self.of.folding.names | {"j": "j[None, :]", "L": "L[:, None]", "delta": "delta[:, None]"}
        kept = f"here[None, :]{self.of.kept(0, names)}"
        gradient = [*self._weight(names, kept, "MASKED"), *self._slope(names, "MASKED")]
        gradient += [*self._of_tables(names, "MASKED"), self._of_products(names)]
        gradient += ["run_x += tl.sum(u, 1)", "run_r += tl.sum(wg, 1)"] if self.scans else []
        spec = self.of.spec
        flags = {"NARROW": bool(spec.tiles), "MOVED": bool(spec.k_positions), "SCANS": self.scans}
        said = {
            "sums": self.sums,
            "edges": listed([*self._edges, *(["row"] if self.scans else [])]),
            "own": listed(self.of.own(0)),
            "tables": listed(self.of.looked_up),
            "grads": listed(self.grads),
            "gradient": gradient,
        }
        return filled("attend_back_queries_tile", flags, said)

    def _queries(self) -> str:
        begin = ["dq = tl.zeros((BM, DP), tl.float32)"]
        begin += [f"{word} = tl.zeros((BM,), tl.float32)" for word in self.sums.split(", ")[1:] if "run" not in word]
        for word in ("x", "r") if self.scans else ():
            begin.append(f"run_{word} = tl.load(RUN_{word.upper()} + row, mask=inside, other=0.0)")
        edges = [*self._edges, "row"] if self.scans else []
        given = [self.sums, "q", "go", "k", "v", "L", "delta", *edges, "b", "h", "i", "inside", "N", "M0", "jt"]
        given += [*self.of.named(0), *self.of.looked_up, *self.grads, *SIZES]
        calls = tuple(f"{self.sums} = tile({', '.join(given)}, {masked})" for masked in (True, False))
        said = {
            "runs": listed([*(["RUN_X", "RUN_R"] if self.scans else []), *self._edges]),
            "keys": listed(self.of.keys),
            "tables": listed(self.of.looked_up),
            "grads": listed(self.grads),
            "group": self.of.group,
            "block": self.of.block,
            "guarded": self._guarded,
            "begin": begin,
            "loops": [*self.of.pointers(0), *self.of.walk(0, calls)],  # type: ignore[arg-type]
            "store": list(self._stored()),
        }
        return filled("attend_back_queries", {"KEEPS": self.keeps, "SCANS": self.scans}, said)

    def _stored(self) -> Iterator[str]:
        """The rows' own sums, where they belong: at one place for all rows of a head, or each at its own."""
        yield from self._of_virtual()
        for k, looked in enumerate(self.lookups):
            if not looked.by_row:
                continue
            if "i" in looked.indices or (self.of.packed and "h" in looked.indices):
                yield f"tl.atomic_add({self._target(looked, {})}, sum{k}, mask=inside, sem='relaxed')"
            else:
                yield f"tl.atomic_add({self._target(looked, {})}, tl.sum(sum{k}), sem='relaxed')"

    # --- over tiles of keys -------------------------------------------------------------------------------------------

    @property
    def _key_own(self) -> list[str]:
        return ["at_q", "at_q_n"] if self.of.spec.q_positions else []

    def _tile_of_queries(self) -> str:
        names = {"i": "i[None, :]", "j": "j[:, None]", "L": "L[None, :]", "delta": "delta[None, :]"}
        kept = f"here[:, None] & inside[None, :]{self.of.kept(0, names)}"
        said = {
            "edges": listed(self._edges),
            "own": listed(self._key_own),
            "tables": listed(self.of.looked_up),
            "guarded": self._guarded,
            "weight": self._weight(names, kept),
            "gradient": [*self._slope(names), self._of_products(names)],
        }
        spec = self.of.spec
        flags = {"KEEPS": self.keeps, "MOVED_QUERIES": bool(spec.q_positions), "NARROW": bool(spec.tiles)}
        return filled("attend_back_keys_tile", flags | {"SCANS": self.scans}, said)

    def _keys(self) -> str:
        walk = Walk("", "N", "BM", "shift").past(self._reached, always_cut=True)
        edges = ["edge_x", "edge_r", "EDGES"] if self.scans else []
        given = [
            "dk, dv",
            "k",
            "v",
            "q",
            "go",
            "kept",
            "delta",
            *edges,
            "b",
            "h",
            "j",
            "here",
            "N",
            "M0",
            "shift",
            "it",
        ]
        given += ["Q_n", "Q_d", "GO_n", "GO_d", *(["at_q", "at_q0_n"] if self._key_own else [])]
        call = f"dk, dv = tile({', '.join([*given, *self.of.looked_up, *_KEY_SIZES])})"
        pointers = ["kept = KEPT + (b_ * H + h) * N", "delta = DELTA + (b_ * H + h) * N"]
        for word in ("X", "R") if self.scans else ():
            pointers.append(f"edge_{word.lower()} = EDGE_{word} + (b_ * H + h) * N * EDGES + block")
        if self._key_own:
            pointers.append("at_q = at_q0 + b * at_q0_b + h * at_q0_h")
        said = {
            "edges": listed(self._edges),
            "keys": listed(self._key_arguments()),
            "tables": listed(self.of.looked_up),
            "bounds": [] if self.of.spec.tiles else walk.lines,
            "pointers": pointers,
            "loops": list(walked_list("it", call) if self.of.spec.tiles else walked(walk.loops, "it", (call, call))),
        }
        return filled("attend_back_keys", {"MOVED": bool(self.of.spec.k_positions)}, said)

    def _key_arguments(self) -> list[str]:
        found = [a for a in self.of.of_keys(0) if a not in ("G0",)] + self.of.lists
        return found + (["at_q0", "at_q0_b", "at_q0_h", "at_q0_n"] if self._key_own else [])

    @property
    def _reached(self) -> tuple[Reached, ...]:
        moved = self.of.spec.k_positions or self.of.spec.q_positions
        return EVERYWHERE if moved else spans(self.of.predicate(), "i")


def _under(condition: str, line: str) -> list[str]:
    return [f"if {condition}:", f"    {line}"] if condition else [line]


@lru_cache(maxsize=1024)
def why_no_gradient(of: Attend, learned: Sequence[int] = ()) -> str | None:
    """Why there is no kernel for a spec's gradient; None where there is."""
    spec = of.spec
    changed = {int(e.args[0][1:]) for e in parse(spec.after or "0").walk() if e.op == "lookup"}
    if changed & set(learned):
        return "the gradient of a table that changes weights afterwards"
    made = Gradient(of, tuple(learned))
    return refusal(lambda: (made.source, made.source_of_keys))
