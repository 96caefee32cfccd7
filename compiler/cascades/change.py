"""How a value changes when another is replaced: the types by which a barrier is soft or hard.

    I   not at all                          S   by a factor, the product of g^a
    A   by a sum, of c * x                  P   as a polynomial whose coefficients can be summed one by one
    O   in a way that nothing corrects      Z   it is that value, or a number made of it

exp turns A into S and log back; a reduction keeps what can be pulled out of it. `exp(x - X)` is S{e^X: -1}, so a sum of
it made with an old X is put right by exp(X_old - X_new).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..symbol_text import parse
from ..symbols import Expr

POWER = "e^"  # in front of a name: the exponential of it


@dataclass(frozen=True)
class Change:
    kind: str
    of: tuple[tuple[str, float], ...] = ()  # S: factor -> exponent; A: term -> coefficient; Z: its one name

    def __str__(self) -> str:
        if self.kind in ("S", "A"):
            return f"{self.kind}{{{', '.join(f'{g}: {a:g}' for g, a in self.of)}}}"
        return self.kind


I, P, O = Change("I"), Change("P"), Change("O")


def factors(of: Mapping[str, float], kind: str = "S") -> Change:
    """S or A with what cancels left out; nothing left is I."""
    left = tuple(sorted((g, a) for g, a in of.items() if a != 0))
    return Change(kind, left) if left else I


@dataclass(frozen=True)
class Typing:
    """What the types of an expression depend on: its names' own, and what is free of the streamed ranks."""

    leaf: Callable[[str], Change]
    free: Callable[[Expr], bool]
    positive: Callable[[Expr], bool]

    def of(self, e: Expr) -> Change:
        found = self._of(e)
        return Change("Z", ((e.text, 1.0),)) if found.kind in "PO" and self.free(e) else found

    def _of(self, e: Expr) -> Change:
        if e.op == "name":
            return self.leaf(e.args[0])
        if e.op == "const":
            return I
        args = [a for a in e.args if isinstance(a, Expr)]
        types = [self.of(a) for a in args]
        if all(t == I for t in types):
            return I
        rule = _RULES.get(e.op)
        return rule(self, e, args, types) if rule else O

    def as_factor(self, e: Expr, t: Change) -> Change:
        """A number of the replaced value's own making is a factor where it is multiplied."""
        if t.kind in ("Z", "A", "P", "O") and (t.kind == "Z" or self.free(e)):
            return factors({t.of[0][0] if t.kind == "Z" else e.text: 1.0})
        return t

    def as_term(self, e: Expr, t: Change) -> Change:
        if t.kind == "Z":
            return factors({t.of[0][0]: 1.0}, "A")
        if t.kind in ("S", "P", "O") and self.free(e):
            return factors({e.text: 1.0}, "A")
        return t


Rule = Callable[[Typing, Expr, list[Expr], list[Change]], Change]


def _mul(at: Typing, e: Expr, args: list[Expr], types: list[Change]) -> Change:
    changing = [(a, t) for a, t in zip(args, types) if t != I]
    steady = [a for a, t in zip(args, types) if t == I]
    if len(changing) == 1 and all(a.op == "const" for a in steady):
        return _scaled(at, *changing[0], by=_product(steady))
    return _product_of([at.as_factor(a, t) for a, t in changing])


def _product(steady: list[Expr]) -> float:
    total = 1.0
    for a in steady:
        total *= a.args[0]
    return total


def _scaled(at: Typing, e: Expr, t: Change, by: float) -> Change:
    if t.kind == "Z":
        t = at.as_term(e, t)
    return factors({g: a * by for g, a in t.of}, "A") if t.kind == "A" else t


def _product_of(types: list[Change], signs: list[int] | None = None) -> Change:
    total: dict[str, float] = {}
    for t, sign in zip(types, signs or [1] * len(types)):
        if t.kind == "O" or (sign < 0 and t.kind in "AP"):
            return O
        if t.kind in "AP":
            total["P"] = 1.0
        for g, a in t.of if t.kind == "S" else ():
            total[g] = total.get(g, 0.0) + sign * a
    return P if "P" in total else factors(total)


def _div(at: Typing, e: Expr, args: list[Expr], types: list[Change]) -> Change:
    (a, b), (t, u) = args, types
    if b.op == "const":
        return _scaled(at, a, t, by=1.0 / b.args[0])
    return _product_of([at.as_factor(a, t), at.as_factor(b, u)], [1, -1])


def _add(at: Typing, e: Expr, args: list[Expr], types: list[Change]) -> Change:
    if types[0].kind == "S" and all(t == types[0] for t in types):
        return types[0]
    terms = [at.as_term(a, t) for a, t in zip(args, types)]
    if any(t.kind == "O" for t in terms):
        return O
    if all(t.kind in "IA" for t in terms):
        total: dict[str, float] = {}
        for t in terms:
            for x, c in t.of:
                total[x] = total.get(x, 0.0) + c
        return factors(total, "A")
    return P


def _exp(at: Typing, e: Expr, args: list[Expr], types: list[Change]) -> Change:
    term = at.as_term(args[0], types[0])
    base = 0.6931471805599453 if e.op == "exp2" else 1.0
    return factors({POWER + x: c * base for x, c in term.of}) if term.kind == "A" else O


def _log(at: Typing, e: Expr, args: list[Expr], types: list[Change]) -> Change:
    factor = at.as_factor(args[0], types[0])
    if factor.kind != "S":
        return O
    return factors({g.removeprefix(POWER) if g.startswith(POWER) else f"log({g})": a for g, a in factor.of}, "A")


def _homogeneous(at: Typing, e: Expr, args: list[Expr], types: list[Change]) -> Change:
    """f(c x) = c^d f(x): the factor comes out, where it cannot be negative."""
    factor = at.as_factor(args[0], types[0])
    whole = e.op == "pow" and args[1].op == "const" and float(args[1].args[0]).is_integer()
    degree = {"sqrt": 0.5}.get(e.op, 1.0)
    if e.op == "pow":
        if args[1].op != "const":
            return O
        degree = float(args[1].args[0])
    if factor.kind in "AP":
        return P if whole and degree > 0 else O
    if factor.kind != "S" or not (whole or _positive(at, factor)):
        return O
    return factors({g: a * degree for g, a in factor.of})


def _positive(at: Typing, t: Change) -> bool:
    return all(g.startswith(POWER) or at.positive(parse(g)) for g, _ in t.of)


def _extreme(at: Typing, e: Expr, args: list[Expr], types: list[Change]) -> Change:
    if any(t != types[0] for t in types):
        return O
    return types[0] if types[0].kind == "A" or (types[0].kind == "S" and _positive(at, types[0])) else O


def _where(at: Typing, e: Expr, args: list[Expr], types: list[Change]) -> Change:
    """A choice that does not depend on the replaced value; 0 has every factor, -inf every term."""
    if types[0] != I:
        return O
    given = [t for a, t in zip(args[1:], types[1:]) if not (a.op == "const" and _neutral(a.args[0], types[1:]))]
    return given[0] if all(t == given[0] for t in given) and given[0].kind in "ISA" else O


def _neutral(value: Any, types: list[Change]) -> bool:
    kinds = {t.kind for t in types}
    return (value == 0 and "S" in kinds) or (abs(value) == float("inf") and "A" in kinds)


_RULES: dict[str, Rule] = {
    "mul": _mul,
    "truediv": _div,
    "add": _add,
    "exp": _exp,
    "exp2": _exp,
    "log": _log,
    "relu": _homogeneous,
    "abs": _homogeneous,
    "sqrt": _homogeneous,
    "pow": _homogeneous,
    "maximum": _extreme,
    "minimum": _extreme,
    "where": _where,
}


def reduced(t: Change, monoid: str, positive: bool) -> Change:
    """The type of a reduction of values of a type."""
    match t.kind, monoid:
        case ("I", _):
            return I
        case ("S", "sum"):
            return t
        case ("A" | "P", "sum"):
            return P
        case ("S", "max" | "min") if positive:
            return t
        case ("A", "max" | "min"):
            return t
    return O
