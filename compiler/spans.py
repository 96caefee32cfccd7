"""Which indices along one side of the pairs a predicate can keep, for a box of the other side: ranges in closed form.

The loops of a kernel over keys (or, in a gradient, over queries) run along them; where all pairs are kept the predicate
need not be asked. A condition that bounds nothing (a table, a remainder) leaves a range as it is, and nothing whole.

>>> for reached in spans(parse("(j <= i) & ((i <= j + 7) | (j <= 3))"), "j"): print(reached)
from 0 below minimum(4, i1 + 1); whole from 0 below minimum(4, i0 + 1)
from maximum(0, i0 - 7) below i1 + 1; whole from maximum(0, i1 - 7) below i0 + 1
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from .boxes import CORNERS
from .symbol_text import parse
from .symbols import TRUE, Expr, as_expr, build, linear

_MOST = 8  # alternatives, beyond which one range holds them all
_END = as_expr(1 << 30)  # beyond every index
ZERO = as_expr(0)


@dataclass(frozen=True)
class Span:
    """low <= x < high, where `guard` holds of the box, else nothing; `high` None: to the end."""

    low: Expr
    high: Expr | None
    guard: Expr = TRUE

    @property
    def starts_late(self) -> bool:
        return self.low.text != ZERO.text

    def __str__(self) -> str:
        text = f"from {self.low}" + ("" if self.high is None else f" below {self.high}")
        return text if self.guard.text == TRUE.text else f"{text}, if {self.guard}"


NOTHING = Span(ZERO, ZERO)


@dataclass(frozen=True)
class Reached:
    """A range outside of which nothing is kept for the box, and one inside of which everything is."""

    some: Span
    every: Span = NOTHING

    def __str__(self) -> str:
        return f"{self.some}" if self.every is NOTHING else f"{self.some}; whole {self.every}"


def spans(predicate: Expr, along: str) -> tuple[Reached, ...]:
    """Ranges of `along` ("j" or "i") that together hold all that is kept; walked in this order, a loop that begins
    no earlier than those before it have ended misses none."""
    return _spans(predicate.text, along)


@lru_cache(maxsize=1024)
def _spans(text: str, along: str) -> tuple[Reached, ...]:
    found = [_of(conditions, along) for conditions in _alternatives(parse(text))]
    late = [reached for reached in found if reached.some.starts_late]
    if len(late) > 1 or len(found) > _MOST:  # they may begin in any order: one range for all
        return (Reached(_hull([reached.some for reached in found])),)
    return (*(reached for reached in found if not reached.some.starts_late), *late)


def _alternatives(e: Expr) -> list[tuple[Expr, ...]]:
    """Disjunctive normal form: of each alternative the conditions that must all hold."""
    if e.op == "or":
        return [conditions for a in e.args for conditions in _alternatives(a)]
    if e.op == "and":
        return [tuple(c for part in parts for c in part) for parts in product(*map(_alternatives, e.args))]
    return [()] if e.text == TRUE.text else [(e,)]


def _hull(parts: list[Span]) -> Span:
    """From the lowest beginning to the highest end of those whose guard holds."""
    lows = [_guarded(part, part.low, _END) for part in parts]
    highs = [_guarded(part, _END if part.high is None else part.high, ZERO) for part in parts]
    low, high = _extreme("minimum", lows), _extreme("maximum", highs)
    assert low is not None
    return Span(low, None if any(h.text == _END.text for h in highs) else high)


def _guarded(part: Span, value: Expr, otherwise: Expr) -> Expr:
    return build("where", part.guard, value, otherwise)


def _of(conditions: tuple[Expr, ...], along: str) -> Reached:
    bounds = [bound for condition in conditions for bound in _bounds(condition, along)]
    some, every = (_span([(kind, values[which]) for kind, *values in bounds if values]) for which in (0, 1))
    understood = all(kind != "opaque" for kind, *_ in bounds)
    return Reached(some, every) if understood else Reached(some)


def _span(bounds: list[tuple[str, Expr]]) -> Span:
    low = _extreme("maximum", [ZERO, *(value for kind, value in bounds if kind == "low")])
    high = _extreme("minimum", [value for kind, value in bounds if kind == "high"])
    guards = [value for kind, value in bounds if kind == "guard"]
    return Span(ZERO if low is None else low, high, build("and", TRUE, *guards))


def _extreme(op: str, values: list[Expr]) -> Expr | None:
    found: Expr | None = None
    for value in values:
        found = value if found is None else build(op, found, value)
    return found


Bound = tuple[str, Expr, Expr] | tuple[str]  # of a kind: for some pair of the box, for all of them; ("opaque",)


def _bounds(condition: Expr, along: str) -> Iterator[Bound]:
    """What a condition says of `along`."""
    if condition.op == "eq":
        left, right = condition.args
        yield from _bounds(build("le", left, right), along)
        yield from _bounds(build("le", right, left), along)
        return
    found = _solved(condition, along) if condition.op == "le" and all(a.is_integer for a in condition.args) else None
    yield ("opaque",) if found is None else found


def _solved(condition: Expr, along: str) -> Bound | None:
    """left <= right, with at most one term that knows x: factor term + rest <= 0."""
    terms, constant = linear(build("sub", *condition.args))
    own = [(term, factor) for term, factor in terms.values() if along in term.names]
    rest = [(term, factor) for term, factor in terms.values() if along not in term.names]
    other = "j" if along == "i" else "i"
    least, most = (_rest(rest, constant, other, highest) for highest in (False, True))
    if least is None or most is None or len(own) > 1 or (own and abs(own[0][1]) != 1):
        return None
    if not own:
        return "guard", build("le", least, ZERO), build("le", most, ZERO)
    term, factor = own[0]
    some, every = (_bound(term, along, factor > 0, value) for value in (least, most))
    return None if some is None or every is None else ("high" if factor > 0 else "low", some, every)


def _rest(terms: list[tuple[Expr, int]], constant: int, other: str, highest: bool) -> Expr | None:
    """The sum of the other terms at the corner of the box that makes it least, or greatest."""
    first, last = CORNERS[other]
    total = as_expr(constant)
    for term, factor in terms:
        if other in term.names:
            if not _rises(term, other):
                return None
            term = term.replace({other: last if (factor > 0) is highest else first})
        elif not term.names <= {"N", "M"}:
            return None
        total = total + term * factor
    return total


def _rises(term: Expr, x: str) -> bool:
    """Whether a term is x, or x divided by a positive number and rounded down."""
    return term.text == x or (_divided(term, x) is not None)


def _divided(term: Expr, x: str) -> tuple[int, int] | None:
    """(c, w) of (x + c) // w."""
    if term.op != "floordiv" or term.args[1].op != "const" or not term.args[1].is_integer or term.args[1].args[0] < 1:
        return None
    terms, constant = linear(term.args[0])
    if set(terms) != {x} or terms[x][1] != 1 or not isinstance(constant, int):
        return None
    return constant, term.args[1].args[0]


def _bound(term: Expr, along: str, above: bool, rest: Expr) -> Expr | None:
    """Of x where term + rest <= 0: the first x beyond; where rest <= term: the first x."""
    known = (0, 1) if term.text == along else _divided(term, along)
    if known is None:
        return None
    offset, width = known  # (x + c) // w <= -rest: x < w (1 - rest) - c
    quotient = build("add", build("mul", rest, -1), 1) if above else rest
    return build("add", build("mul", quotient, width), -offset)
