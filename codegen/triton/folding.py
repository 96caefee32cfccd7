"""What a row gathers while tiles of keys pass by it, as statements of a kernel: read off the loop nest of its cascade.

The nest says which values run along the keys, how one made with old values is put right, and what may be divided out at
the end. So a maximum, a sum under it, a plain sum and a scan from the last key on are all the same few lines here, and
no normaliser is known by its name. Scores are in powers of two wherever only exponentials and logarithms follow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from ...compiler.cascades.change import POWER
from ...compiler.cascades.einsum import Node
from ...compiler.cascades.nest import LoopNest
from ...compiler.cascades.of_mechanism import cascade_of_spec
from ...compiler.primitives.attend_spec import AttendSpec
from ...compiler.refusal import Refused
from ...compiler.symbol_eval import evaluate
from ...compiler.symbol_slope import slope
from ...compiler.symbol_text import parse
from ...compiler.symbols import Expr, as_expr, build, name
from .printer import triton_text

LOG2E = 1 / math.log(2)
START = {"max": 'float("-inf")', "sum": "0.0"}
FAR = 8.0  # powers of two that a maximum may rise by before sums are put right: a weight is 256 at most until then
SCORE = "s"  # how a score is called in a tile


@dataclass(frozen=True)
class Row:
    """A weight as a function of its score and of one number kept of the row, and what becomes of it in a gradient."""

    kept: Expr | None  # that number, from the settled values; None: none is needed
    weight: Expr  # of s and `kept`
    divided: bool  # whether the weights of a row were divided by their sum: then a gradient has a second term
    virtual: Expr | None = None  # the score of one more key in that sum, whose value is 0
    scan: Expr | None = None  # of s: what is summed from the last key on, up to and with this one, as X in the weight

    @property
    def slope(self) -> Expr:
        return slope(self.weight, "s")


@dataclass(frozen=True)
class Folding:
    """The statements of one spec; tables are those that its own expressions look up."""

    spec: AttendSpec
    tables: str
    packed: bool = False  # each row has a head of its own
    lazily: bool = False  # sums are put right only once a maximum has risen far

    @property
    def names(self) -> dict[str, str]:
        """How the indices of a row are written beside every key."""
        return {"i": "i[:, None]"} | ({"h": "h[:, None]"} if self.packed else {})

    @cached_property
    def nest(self) -> LoopNest:
        found = cascade_of_spec(_bare(self.spec).text)
        nest = LoopNest(found.cascade, found.keys[0])
        if nest.passes > 1:
            raise Refused(f"{nest.passes} passes over the keys", fits="a normaliser that needs one")
        for sum_ in nest.sums.values():
            if sum_.change.kind not in "IS":  # what it has gathered is put right by no factor
                raise Refused(f"a sum {sum_.node}", fits="one that changes by factors")
        return nest

    @property
    def powers(self) -> bool:
        return not self.spec.weight

    @cached_property
    def hidden(self) -> bool:
        """Whether a key is sure to weigh nothing, and to have no gradient, once its score is -inf."""
        if self.powers:
            return True
        weight = parse(self.spec.weight)
        if self.spec.after or weight.names != {"s"} or any(e.op == "lookup" for e in weight.walk()):
            return False
        lowest = torch.tensor(-math.inf)
        return all(float(evaluate(e, {"s": lowest}, {})) == 0.0 for e in (weight, slope(weight, "s")))

    @cached_property
    def lazy(self) -> str:
        """The running maximum that may lag behind: where sums are put right by a factor of it, and by nothing else."""
        words = {g.removeprefix(POWER) for s in self.nest.sums.values() for g, _ in s.change.of if g.startswith(POWER)}
        running = {s.node.name for s in self.nest.sums.values() if s.node.monoid == "max"}
        alone = self.lazily and self.powers and len(words) == 1 and words <= running
        return next(iter(words)) if alone else ""

    @property
    def backwards(self) -> bool:
        """Whether tiles pass from the last key on."""
        return self.nest.reverse

    @cached_property
    def _nodes(self) -> tuple[Node, ...]:
        return self.nest.cascade.needed(self.nest.cascade.outputs)

    def _along(self, node: Node) -> bool:
        return self.nest.rank in node.ranks

    @cached_property
    def _product(self) -> Node:
        """The products q . k, which a tile has already."""
        return next(n for n in self._nodes if n.kind == "reduce" and self.nest.rank not in n.over)

    @cached_property
    def _values(self) -> Node:
        """The sum of values under the weights."""
        return self.nest.cascade.by_name[self.nest.cascade.outputs[0]]

    @cached_property
    def _divisors(self) -> tuple[str, ...]:
        """What every weight of a row is divided by, and what can be divided by once at the end."""
        of = self.nest.sums[self._values.name].change.of
        late = [(g, power) for g, power in of if not g.startswith(POWER) and not g.endswith("_carry")]
        if any(power != -1 for _, power in late):
            raise Refused(f"weights that change by {late}", fits="a division by a sum")
        return tuple(g for g, _ in late)

    # --- statements ---------------------------------------------------------------------------------------------------

    @property
    def state(self) -> tuple[tuple[str, str], ...]:
        """What runs along the keys, and what it starts from."""
        sums = [s.node for s in self.nest.sums.values() if s.node is not self._values]
        return (*((n.name, START[n.monoid]) for n in sums), *((n.name, "0.0") for n in self.nest.scans))

    @property
    def leaves(self) -> list[str]:
        return [n.name for n in self._nodes if self._is_leaf(n)]

    @property
    def given(self) -> list[str]:
        """Values of a row that no key has a part in, before the first tile."""
        return [f"{n.name} = whole({self.score(numbered(n.expr))}, BM)" for n in self._nodes if self._is_leaf(n)]

    def _is_leaf(self, node: Node) -> bool:
        computed = any(word in self.nest.cascade.by_name for word in node.named)
        return node.kind == "map" and not computed and not self._along(node)

    def score(self, score: Expr, names: Mapping[str, str] = {}) -> str:
        """What a spec's own expression gives, in powers of two where the rest is."""
        e = build("mul", score, as_expr(LOG2E)) if self.powers else score
        return triton_text(e, "f", names, tables=self.tables)

    def tile(self) -> list[str]:
        """From the scores of a tile to its weights; what runs along the keys follows."""
        lines: list[str] = []
        now: dict[str, str] = {}
        for node in self._nodes:
            if node is self._product or node is self._values or node.name in self.nest.cascade.outputs[1:]:
                continue
            if self._along(node) and node.kind == "scan":
                summed = self._text(node.expr, now)
                running = f"tl.cumsum({summed}, 1, reverse={node.reverse})"
                lines.append(f"{node.name}_tile = {node.name}[:, None] + {running}")
                lines.append(f"{node.name} += tl.sum({summed}, 1)")
            elif self._along(node):
                if self._element(node.name) == node.name:
                    lines.append(f"{node.name} = {self._text(self._undivided(node.expr), now)}")
                    if not self.hidden:
                        lines += ["if MASKED:", f"    {node.name} = tl.where(kept, {node.name}, 0.0)"]
            elif node.kind == "reduce":
                lines += self._summed(node, now)
            elif not self._is_leaf(node) and self._corrects(node.name):
                lines += self._settled(node, now)
        return lines

    @property
    def weights(self) -> str:
        """The tile's weights, as they meet the values."""
        return self._text(self._values_weight, {})

    @property
    def _values_weight(self) -> Expr:
        """The weight among the factors of that sum: the one that the cascade computes."""
        return next(a for a in self._values.expr.args if a.text in self.nest.cascade.by_name)

    def _element(self, word: str) -> str:
        """The variable that holds a value of the tile: one that only names another is that other."""
        node = self.nest.cascade.by_name[word]
        if node is self._product:
            return SCORE
        same = self._undivided(node.expr)
        return self._element(same.args[0]) if node.kind == "map" and same.op == "name" else word

    def _summed(self, node: Node, now: dict[str, str]) -> list[str]:
        value = self._text(node.expr, now)
        if node.monoid == "max":
            now[node.name] = f"{node.name}_now"
            lines = [f"{node.name}_now = tl.maximum({node.name}, tl.max({value}, 1))"]
            if self.lazy == node.name:
                rose = f"{node.name}_now - {node.name} > {FAR}"
                lines.append(f"{node.name}_now = tl.where({rose}, {node.name}_now, {node.name})")
            return [*lines, *self._guarded(node.name, now)] if self._corrects(node.name) else lines
        return [f"{node.name} = {node.name}{self.correction(node=node)} + tl.sum({value}, 1)"]

    def _settled(self, node: Node, now: dict[str, str]) -> list[str]:
        """A value of the row that follows from those that run: before this tile, and with it."""
        old, new = self.printed(node.expr), self.printed(node.expr, now)
        return [f"{node.name} = {old}", f"{node.name}_now = {new}", *self._guarded(node.name, now)]

    def _guarded(self, word: str, now: dict[str, str]) -> list[str]:
        """Where nothing has been kept so far a maximum is -inf: scores are measured against 0 then."""
        now[word] = f"{word}_now"
        safe = f'{word}_at = tl.where({word}_now == float("-inf"), 0.0, {word}_now)'
        return [safe, f"{word}_less = {self._exp}({word} - {word}_at)"]

    @property
    def _exp(self) -> str:
        return "tl.exp2" if self.powers else "tl.exp"

    def _corrects(self, word: str) -> bool:
        return any(g == f"{POWER}{word}" for s in self.nest.sums.values() for g, _ in s.change.of)

    def correction(self, beside: str = "", node: Node | None = None, of: str = "") -> str:
        """The factor that puts a sum right, written `beside` it; "" where there is none. `of`: whose sum, in a join."""
        sum_ = self.nest.sums[(node or self._values).name]
        words = [(g.removeprefix(POWER), power) for g, power in sum_.change.of if g.startswith(POWER)]
        words = [(word, power) for word, power in words if not word.endswith("_carry")]
        if any(power != -1 for _, power in words):
            raise Refused(f"a sum that changes by {sum_.change}", fits="one factor of an exponential")
        return "".join(f" * {word}{of}_less{beside}" for word, _ in words)

    @property
    def joined(self) -> list[str]:
        """What two ranges of keys have gathered, the second's as `_part`, becomes what both have."""
        if self.nest.scans:
            raise Refused("what runs along the keys in their order", fits="sums and maxima")
        lines: list[str] = []
        now: dict[str, str] = {}
        parts = {name: f"{name}_part" for name, _ in self.state}
        for node in self._of_rows:
            if node.kind == "map":
                lines += [f"{node.name}_part = {self.printed(node.expr, parts)}", *self._settled(node, now)]
            elif node.monoid == "max":
                now[node.name] = f"{node.name}_now"
                lines.append(f"{node.name}_now = tl.maximum({node.name}, {node.name}_part)")
                lines += self._guarded(node.name, now) if self._corrects(node.name) else []
            else:
                own, other = self.correction(node=node), self.correction(node=node, of="_part")
                lines.append(f"{node.name} = {node.name}{own} + {node.name}_part{other}")
            if self._corrects(node.name):
                lines.append(f"{node.name}_part_less = {self._exp}({node.name}_part - {node.name}_at)")
        return lines

    @property
    def _of_rows(self) -> Iterator[Node]:
        """What keys are gathered into, and what follows from it and puts other sums right."""
        for node in self._nodes:
            if self._along(node) or node is self._values or node.name in self.nest.cascade.outputs[1:]:
                continue
            if node.kind == "reduce" or (node.kind == "map" and not self._is_leaf(node) and self._corrects(node.name)):
                yield node

    @property
    def moved(self) -> list[str]:
        """The running maxima, at the end of a tile."""
        running = [s.node.name for s in self.nest.sums.values() if s.node.monoid == "max"]
        return [f"{word} = {word}_now" for word in running]

    @property
    def settled(self) -> list[str]:
        """Behind the last tile: everything that follows from what has run."""
        lines: list[str] = []
        at: dict[str, str] = {}
        for node in self._nodes:
            if self._along(node) or node.kind not in ("map", "reduce") or self._is_leaf(node):
                continue
            if node is self._values or node.name in self.nest.cascade.outputs[1:]:
                continue
            if node.kind == "map":
                lines.append(f"{node.name} = {self.printed(node.expr, at)}")
            if self._corrects(node.name):
                lines.append(f'{node.name}_at = tl.where({node.name} == float("-inf"), 0.0, {node.name})')
                at[node.name] = f"{node.name}_at"
        return lines

    @cached_property
    def _at(self) -> dict[str, str]:
        return {n.name: f"{n.name}_at" for n in self._nodes if self._corrects(n.name)}

    @property
    def divisor(self) -> str:
        """What the sum of values is divided by; "" where by nothing."""
        return " * ".join(self.printed(parse(g), self._at) for g in self._divisors)

    @property
    def lse(self) -> str:
        node = self.nest.cascade.by_name[self.nest.cascade.outputs[1]]
        text = self.printed(node.expr, self._at)
        return f"{text} * {1 / LOG2E!r}" if self.powers else text

    # --- a row, once it is whole --------------------------------------------------------------------------------------

    @cached_property
    def row(self) -> Row:
        """exp(s - X) / D is exp(s - L), L = X + log(D); any other quotient keeps its divisor."""
        whole = self._expanded(self._values_weight)
        if self.nest.scans:
            return self._scanning(whole)
        if not self._divisors:
            return Row(None, whole, False)
        divisor = parse(self._divisors[0])
        if whole.op != "truediv" or whole.args[1].text != divisor.text:
            raise Refused(f"a gradient through {whole}", fits="weights that are divided last")
        over = whole.args[0]
        virtual = self._virtual(over, divisor)
        if over.op == "exp":
            rest = build("sub", over.args[0], name("s"))
            if "s" not in rest.names:
                kept = build("sub", build("log", divisor), rest)
                return Row(kept, build("exp", build("sub", name("s"), name("L"))), True, virtual)
        return Row(divisor, build("truediv", over, name("L")), True, virtual)

    def _scanning(self, whole: Expr) -> Row:
        """A weight takes part in the gradients of all keys behind it; their sum is known where w shrinks as X grows."""
        (scan,) = self.nest.scans
        shrinks = build("mul", slope(whole, "X"), -1).text == whole.text
        if not (scan.reverse and shrinks and self.powers) or self._divisors:
            raise Refused(f"a gradient through {scan}", fits="exp(s - X), X from the last key on")
        return Row(None, whole, False, scan=self._expanded(scan.expr))

    def _virtual(self, weight: Expr, divisor: Expr) -> Expr | None:
        """A leaf that enters the divisor as the score of a key does."""
        by = self.nest.cascade.by_name
        while inner := {w: by[w].expr for w in divisor.names if w in by and self._follows(by[w])}:
            divisor = divisor.replace(inner)
        found = [word for word in self.leaves if _terms(weight.replace({"s": name(word)})) <= _terms(divisor)]
        if len(found) < len(self.leaves):
            raise Refused(f"a gradient through {', '.join(self.leaves)}", fits="one more key in a sum")
        return numbered(by[found[0]].expr) if found else None

    def _follows(self, node: Node) -> bool:
        """Whether a value of a row follows from others and puts no sum right."""
        return node.kind == "map" and not (self._along(node) or self._is_leaf(node) or self._corrects(node.name))

    @property
    def kept(self) -> str:
        """The number of a row that its gradient is made from; "" where it needs none."""
        return "" if self.row.kept is None else self.printed(self.row.kept, self._at)

    def _expanded(self, e: Expr) -> Expr:
        """A weight in terms of its score and of the row."""
        by = self.nest.cascade.by_name
        while True:
            inner = {w: by[w].expr for w in e.names if w in by and self._along(by[w]) and w != self._product.name}
            if not inner:
                return e.replace({self._product.name: name("s")})
            e = e.replace({w: name("X") if by[w].kind == "scan" else expr for w, expr in inner.items()})

    # --- names --------------------------------------------------------------------------------------------------------

    def _text(self, e: Expr, now: Mapping[str, str]) -> str:
        """An expression of a tile: values of a row stand beside every key."""
        names = self.names | {"j": "j[None, :]"}
        for word in e.names:
            node = self.nest.cascade.by_name.get(word)
            if node is None:
                continue
            if node.kind == "scan":
                names[word] = f"{word}_tile"
            elif self._along(node):
                names[word] = self._element(word)
            else:
                names[word] = f"{word}_at[:, None]" if word in now else f"{word}[:, None]"
        return self.printed(e, names)

    def printed(self, e: Expr, names: Mapping[str, str] = {}) -> str:
        """An expression of the cascade. What a weight becomes afterwards is no power of two any more."""
        powers = self.powers and not (self.spec.after and e.text == self._afterwards.text)
        return triton_text(numbered(e), "f", names, tables=self.tables, powers=powers)

    @cached_property
    def _afterwards(self) -> Expr:
        return self._undivided(self.nest.cascade.by_name[self._values_weight.text].expr)

    def _undivided(self, e: Expr) -> Expr:
        return _without(e, self._divisors)


def _bare(spec: AttendSpec) -> AttendSpec:
    """The normaliser alone: one segment, everything kept, its own score."""
    outputs = ("o", "lse") if "lse" in spec.outputs else ("o",)
    return AttendSpec(
        "s",
        after=spec.after,
        weight=spec.weight,
        normaliser=spec.normaliser,
        eps=spec.eps,
        sink=spec.sink,
        outputs=outputs,
    )


def _terms(e: Expr) -> set[str]:
    return {t.text for t in (e.args if e.op == "add" else (e,))}


def _without(e: Expr, divisors: tuple[str, ...]) -> Expr:
    if e.op == "truediv" and e.args[1].text in divisors:
        return _without(e.args[0], divisors)
    if e.op in ("name", "const", "lookup"):
        return e
    return build(e.op, *(_without(a, divisors) for a in e.args))


def numbered(e: Expr) -> Expr:
    """Tables as the spec calls them, t0, t1, ...; a cascade calls them T, T2, ..."""
    if e.op == "lookup":
        number = int(e.args[0][1:] or 1) - 1
        return Expr("lookup", (f"t{number}", *map(numbered, e.args[1:])))
    return e if e.op in ("name", "const") else build(e.op, *map(numbered, e.args))
