"""A polynomial in values that still run: coefficients that are summed by themselves, monomials put in at the end.

sum[d]((X - MU) ** 2)  ->  sum[d](X ** 2) * 1 + sum[d](X) * (-2 MU) + sum[d](1) * MU ** 2
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..refusal import Refused
from ..symbols import Expr, build, const
from .einsum import Cascade, Node


@dataclass(frozen=True)
class Coefficient:
    """One term: what is summed along the streamed rank, and the monomial of running values that multiplies the sum."""

    summed: str
    times: str


def coefficients(
    cascade: Cascade, node: Node, running: Callable[[Expr], bool], free: Callable[[Expr], bool]
) -> tuple[Coefficient, ...]:
    """The terms of what a node sums; refused where it is no polynomial in the running values."""
    terms = _terms(_inlined(cascade, node.expr, running, free), running, free)
    return tuple(Coefficient(summed.text, times.text) for times, summed in terms.values())


_Terms = dict[str, tuple[Expr, Expr]]  # text of the monomial -> (monomial, coefficient)


def _inlined(cascade: Cascade, e: Expr, running: Callable[[Expr], bool], free: Callable[[Expr], bool]) -> Expr:
    """With the equations of all elements that depend on a running value written out."""
    while True:
        names = [n for n in sorted(e.names) if n in cascade.by_name and running(_name(n)) and not free(_name(n))]
        if not names:
            return e
        for word in names:
            if cascade.by_name[word].kind != "map":
                raise Refused(f"{word} is reduced before", where=e.text, fits="a polynomial in running values")
        e = e.replace({word: cascade.by_name[word].expr for word in names})


def _name(word: str) -> Expr:
    return Expr("name", (word,))


def _terms(e: Expr, running: Callable[[Expr], bool], free: Callable[[Expr], bool]) -> _Terms:
    one = const(1)
    if not running(e):
        return {"1": (one, e)}
    if free(e):
        return {e.text: (e, one)}
    parts = [a for a in e.args if isinstance(a, Expr)]
    if e.op == "add":
        total: _Terms = {}
        for part in parts:
            total = _added(total, _terms(part, running, free))
        return total
    if e.op == "mul":
        product: _Terms = {"1": (one, one)}
        for part in parts:
            product = _multiplied(product, _terms(part, running, free))
        return product
    if e.op == "truediv" and (free(parts[1]) or not running(parts[1])):
        below = build("truediv", 1.0, parts[1])
        return _multiplied(_terms(parts[0], running, free), _terms(below, running, free))
    if e.op == "pow" and parts[1].op == "const" and parts[1].args[0] in (2, 3, 4):
        power = base = _terms(parts[0], running, free)
        for _ in range(int(parts[1].args[0]) - 1):
            power = _multiplied(power, base)
        return power
    raise Refused(f"`{e.text}`", where="cascade", fits="a polynomial in running values")


def _added(a: _Terms, b: _Terms) -> _Terms:
    total = dict(a)
    for key, (times, summed) in b.items():
        total[key] = (times, build("add", total[key][1], summed)) if key in total else (times, summed)
    return total


def _multiplied(a: _Terms, b: _Terms) -> _Terms:
    total: _Terms = {}
    for left, own in a.values():
        for right, other in b.values():
            times = build("mul", left, right)
            total = _added(total, {times.text: (times, build("mul", own, other))})
    return total
