"""Constant factors moved into constants that are there already: for kernels, where every score pays for an operation.

>>> from .symbol_text import parse
>>> carried(parse("tanh(s / 4) * 3 + (i - j) * h"), 2.0).text
'h * (i - j) * 2.0 + tanh(s * 0.25) * 6.0'
"""

from __future__ import annotations

from collections.abc import Iterator

from .symbols import Expr, build


def carried(e: Expr, factor: float = 1.0) -> Expr:
    """`e * factor`: a sum's terms carry it, and nothing is divided by a constant."""
    if e.op == "const" and not e.is_boolean:
        return build("mul", e, factor) if factor != 1 else e
    if e.is_integer or e.is_boolean or e.op == "name":
        return build("mul", e, factor) if factor != 1 else e
    if e.op == "add":
        return build("add", *(carried(term, factor) for term in e.args))
    if e.op == "truediv" and e.args[1].op == "const" and e.args[1].args[0] != 0:
        return carried(e.args[0], factor / e.args[1].args[0])
    if e.op == "where":
        condition, one, other = e.args
        return build("where", condition, carried(one, factor), carried(other, factor))
    if e.op == "mul":
        parts = list(_factors(e))
        for part in parts:
            factor *= part.args[0] if part.op == "const" else 1
        rest = [part for part in parts if part.op != "const"]
        return carried(rest[0], factor) if len(rest) == 1 else build("mul", *map(carried, rest), factor)
    same = build(e.op, *(carried(a) if isinstance(a, Expr) else a for a in e.args)) if e.op != "lookup" else e
    return build("mul", same, factor) if factor != 1 else same


def _factors(e: Expr) -> Iterator[Expr]:
    for part in e.args:
        yield from _factors(part) if part.op == "mul" else (part,)
