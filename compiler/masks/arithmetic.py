"""Arithmetic on elements: choices between constants are pushed outward, so that comparing a mask gives a condition."""

from __future__ import annotations

from ..symbols import FALSE, TRUE, Expr, build, const


def truth(e: Expr) -> Expr:
    """The value as a condition: itself, or `!= 0`."""
    if e.is_boolean:
        return e
    if e.op == "const":
        return TRUE if e.args[0] != 0 else FALSE
    if e.op == "lookup":
        return build("ne", e, const(0))
    return combine("ne", e, const(0))


def number(condition: Expr, one: float, zero: float) -> Expr:
    """A condition as a number."""
    return build("where", truth(condition), const(one), const(zero))


def same(a: Expr, b: Expr) -> Expr:
    """Whether two conditions agree."""
    return (a & b) | (~a & ~b)


def choose(condition: Expr, a: Expr, b: Expr) -> Expr:
    """where(condition, a, b); of equal values, that value."""
    if condition.op == "const":
        return a if condition.args[0] else b
    return a if a.text == b.text else build("where", condition, a, b)


def combine(op: str, a: Expr, b: Expr) -> Expr:
    """op(a, b), with the choices that an operand makes between plain values moved outside."""
    if is_plain_choice(a) and (_is_plain(b) or is_plain_choice(b) or op in ("le", "lt", "ge", "gt", "eq", "ne")):
        return choose(a.args[0], combine(op, a.args[1], b), combine(op, a.args[2], b))
    if is_plain_choice(b) and (_is_plain(a) or op in ("le", "lt", "ge", "gt", "eq", "ne")):
        return choose(b.args[0], combine(op, a, b.args[1]), combine(op, a, b.args[2]))
    if op in ("minimum", "maximum") and a.op == b.op == "const":
        return const((min if op == "minimum" else max)(a.args[0], b.args[0]))
    return _of_extremes(op, a, b) if op in MIRRORED else build(op, a, b)


MIRRORED = {"le": "ge", "lt": "gt", "ge": "le", "gt": "lt"}


def _of_extremes(op: str, a: Expr, b: Expr) -> Expr:
    """max(x, y) <= z where both are; z <= max(x, y) where one of them is; and so on, for whole numbers."""
    if a.op not in ("minimum", "maximum"):
        if b.op not in ("minimum", "maximum"):
            return build(op, a, b)
        op, a, b = MIRRORED[op], b, a
    if not all(x.is_integer for x in (*a.args, b)):
        return build(op, a, b)
    parts = [build(op, x, b) for x in a.args]
    return build("and" if (a.op == "maximum") == (op in ("le", "lt")) else "or", *parts)


def pushed(e: Expr) -> Expr:
    """The whole expression built again with choices between plain values moved outside."""
    if e.op in ("name", "const"):
        return e
    if e.op == "lookup":
        return Expr("lookup", (e.args[0], *(pushed(a) for a in e.args[1:])))
    args = [pushed(a) for a in e.args]
    if e.op == "where":
        return choose(truth(args[0]), args[1], args[2])
    if e.op in ("and", "or", "not"):
        return build(e.op, *(truth(a) for a in args))
    if len(args) < 2:
        return build(e.op, *args)
    total = args[0]
    for arg in args[1:]:
        total = combine(e.op, total, arg)
    return total


def _is_plain(e: Expr) -> bool:
    return e.op == "const"


def is_plain_choice(e: Expr) -> bool:
    """Whether it chooses between constants, perhaps in several steps."""
    return e.op == "where" and all(_is_plain(x) or is_plain_choice(x) for x in e.args[1:])
