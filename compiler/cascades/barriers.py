"""Soft and hard barriers: whether what waits for a whole fiber can be made with what is known so far and put right.

A barrier X is soft where every later reduction over the fiber has a type that a correction follows from, and nothing
that must exist element by element depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from ..refusal import Refused
from ..symbol_text import parse
from ..symbols import Expr
from .change import POWER, Change, I, O, Typing, reduced
from .coefficients import coefficients
from .einsum import Cascade, Node
from .times import Times

_NOT_NEGATIVE = frozenset({"exp", "exp2", "softplus", "sigmoid", "relu", "abs", "sqrt"})


@dataclass(frozen=True)
class Barrier:
    """One barrier, whether it is soft, and why: the reductions that it changes, with the type of each."""

    name: str
    soft: bool
    changes: tuple[tuple[str, Change], ...]  # reductions over the fiber, and outputs along it
    reason: str  # of a hard one

    def __str__(self) -> str:
        if not self.soft:
            return f"{self.name} hard: {self.reason}"
        found = ", ".join(f"{n} {t}" for n, t in self.changes if t != I)
        return f"{self.name} soft: {found or 'it cancels'}"

    @property
    def corrections(self) -> tuple[tuple[str, str], ...]:
        """What each reduction is multiplied by (or has added) when the barrier's value moves."""
        return tuple((name, correction(t)) for name, t in self.changes if t.kind in "SAP")


def _summable(cascade: Cascade, node: Node, types: Mapping[str, Change], fiber: frozenset[str]) -> bool:
    """Whether a polynomial's coefficients can be written down one by one."""
    try:
        coefficients(cascade, node, lambda e: any(types.get(n, I) != I for n in e.names), _free(cascade, node, fiber))
    except Refused:
        return False
    return True


def correction(t: Change) -> str:
    """The factor of a type as text, X_old being what it was made with."""
    if t.kind == "P":
        return "each coefficient summed by itself"
    parts = [_moved(t.kind, g, a) for g, a in t.of]
    return (" + " if t.kind == "A" else " * ").join(parts)


def _moved(kind: str, g: str, a: float) -> str:
    x = g.removeprefix(POWER)
    x = x if x.isidentifier() else f"({x})"
    old, new = f"{x}_old", f"{x}_new"
    if kind == "A" or g.startswith(POWER):
        step = f"{old} - {new}" if a < 0 else f"{new} - {old}"
        step = step if abs(a) == 1 else f"{abs(a):g} * ({step})"
        return step if kind == "A" else f"exp({step})"
    ratio = f"{old} / {new}" if a < 0 else f"{new} / {old}"
    return ratio if abs(a) == 1 else f"({ratio})^{abs(a):g}"


def barrier(cascade: Cascade, node: Node, found: Times, *, poly: bool = True) -> Barrier:
    """The verdict on one barrier."""
    if node.kind == "global":
        return Barrier(node.name, False, (), f"{node.monoid} needs the whole fiber")
    types = types_when_replaced(cascade, {node.name}, found.fiber)
    seen: list[tuple[str, Change]] = []
    for other in cascade.nodes[cascade.nodes.index(node) + 1 :]:
        t = types[other.name]
        if other.kind in ("reduce", "scan", "last", "global") and set(other.over) & found.fiber:
            inner = types[f"{other.name}'"]
            seen.append((other.name, inner))
            if inner.kind == "O" or t == O or (other.kind == "global" and inner != I):
                return Barrier(node.name, False, tuple(seen), f"{other.name} changes in a way that nothing corrects")
            if not poly and inner.kind == "P":
                return Barrier(node.name, False, tuple(seen), f"{other.name} is a polynomial in it")
            if inner.kind == "P" and not _summable(cascade, other, types, found.fiber):
                return Barrier(node.name, False, tuple(seen), f"{other.name} has no coefficients that can be summed")
        if other.name in cascade.outputs and set(other.ranks) & found.fiber and t != I:
            return Barrier(node.name, False, tuple(seen), f"{other.name} must exist element by element")
    return Barrier(node.name, True, tuple(seen), "")


def types_when_replaced(
    cascade: Cascade,
    replaced: Collection[str],
    fiber: frozenset[str],
    independent: bool = False,
    carried: Collection[str] = (),
) -> dict[str, Change]:
    """The type of every node; `name'` is that of what a node reduces, before it is reduced.

    independent  every number made of a replaced value counts as one of its own: what a merge knows by its value.
    carried      scans that have something before them, which is added to every element.
    """
    types: dict[str, Change] = {o.name: I for o in cascade.operands}
    for node in cascade.nodes:
        at = Typing(_leaf(types), _free(cascade, node, fiber), _positive(cascade))
        t = at.of(node.expr)
        if node.kind == "opaque":
            t = I if all(types[n] == I for n in node.named) else O
        elif node.kind != "map":
            t = _as_streamed(at, node.expr, t)
            types[f"{node.name}'"] = t
            t = _over(cascade, node, t, at)
        lost = t == O and bool(fiber & set(node.over))
        free = not fiber & set(node.ranks)
        if free and not lost and (t.kind in "PO" or (independent and t != I)):
            t = Change("Z", ((node.name, 1.0),))
        if node.name in replaced:
            t = Change("Z", ((node.name, 1.0),))
        if node.name in carried:
            t = Change("A", ((f"{node.name}_carry", 1.0),)) if t == I and node.monoid == "sum" else O
        types[node.name] = t
    return types


def _leaf(types: dict[str, Change]) -> Callable[[str], Change]:
    return lambda word: types.get(word, I)


def _as_streamed(at: Typing, e: Expr, t: Change) -> Change:
    """What is summed over and over although it has no element of its own is a factor."""
    return at.as_factor(e, t) if t.kind == "Z" else t


def _over(cascade: Cascade, node: Node, t: Change, at: Typing) -> Change:
    """The type of a reduction, scan, last element; a factor that itself varies along what is reduced is none."""
    if node.kind == "last":
        return t
    if node.kind == "global":
        return I if t == I and all(at.leaf(word) == I for word in node.also) else O
    for g, _ in t.of:
        if cascade.ranks_of(parse(g.removeprefix(POWER)), node) & set(node.over):
            return O
    if node.kind == "scan" and (node.decay or node.init):
        others = [at.of(parse(text)) for text in (node.decay, node.init) if text]
        if any(other != I for other in others):
            return O
    positive = all(g.startswith(POWER) or at.positive(parse(g)) for g, _ in t.of) if t.kind == "S" else False
    return reduced(t, node.monoid, positive)


def _free(cascade: Cascade, node: Node, fiber: frozenset[str]) -> Callable[[Expr], bool]:
    return lambda e: not cascade.ranks_of(e, node) & fiber


def _positive(cascade: Cascade) -> Callable[[Expr], bool]:
    def positive(e: Expr) -> bool:
        if e.op == "const":
            return float(e.args[0]) >= 0
        if e.op == "name":
            node = cascade.by_name.get(e.args[0])
            return node is not None and positive(node.expr)
        if e.op in _NOT_NEGATIVE:
            return True
        if e.op == "pow":
            return e.args[1].op == "const" and (e.args[1].args[0] % 2 == 0 or positive(e.args[0]))
        if e.op in ("mul", "add", "truediv", "maximum", "minimum"):
            same = e.op == "mul" and len(e.args) == 2 and e.args[0].text == e.args[1].text
            return same or all(positive(a) for a in e.args)
        return e.op == "where" and all(positive(a) for a in e.args[1:])

    return positive
