"""What a predicate says of a whole box of queries i0..i1 and keys j0..j1, as expressions of its four corners.

Sound for every predicate: where `everywhere` holds, all pairs are kept; where `nowhere` holds, none is. Exact where
each index stands once in each condition. Kernels print the two, and tiles.py evaluates them on tensors of corners.

>>> from .symbol_text import parse
>>> everywhere(parse("(j <= i) & (i <= j + 7)"))
(i1 <= j0 + 7) & (j1 <= i0)
>>> nowhere(parse("(j <= i) & (i <= j + 7)"))
(i1 <= j0 - 1) | (j1 <= i0 - 8)
"""

from __future__ import annotations

from .symbols import CORNER_NAMES, FALSE, Expr, as_expr, build, name

Bounds = tuple[Expr, Expr]  # the least and the greatest value
CORNERS = {"i": (name(CORNER_NAMES[0]), name(CORNER_NAMES[1])), "j": (name(CORNER_NAMES[2]), name(CORNER_NAMES[3]))}


def everywhere(e: Expr) -> Expr:
    """Whether the predicate surely holds for all pairs of the box."""
    match e.op:
        case "const":
            return as_expr(bool(e.args[0]))
        case "and" | "or":
            return build(e.op, *map(everywhere, e.args))
        case "not":
            return nowhere(e.args[0])
        case "le" | "lt" | "eq" | "ne":
            return _compared(e)
    return FALSE


def nowhere(e: Expr) -> Expr:
    """Whether the predicate surely holds for no pair of the box."""
    match e.op:
        case "and" | "or":
            return build("or" if e.op == "and" else "and", *map(nowhere, e.args))
        case "not":
            return everywhere(e.args[0])
        case "const" | "le" | "lt" | "eq" | "ne":
            return everywhere(build("not", e))
    return FALSE


def _compared(e: Expr) -> Expr:
    left, right = map(bounds, e.args)
    if left is None or right is None:
        return FALSE
    match e.op:
        case "eq":
            return build("and", build("le", left[1], right[0]), build("le", right[1], left[0]))
        case "ne":
            return build("or", build("lt", left[1], right[0]), build("lt", right[1], left[0]))
    return build(e.op, left[1], right[0])


def bounds(e: Expr) -> Bounds | None:
    """Least and greatest value of an integer expression in the box; None where no rule knows them."""
    if e.op == "name":
        return CORNERS.get(e.args[0], (e, e)) if e.is_integer else None
    if e.op == "const":
        return (e, e) if e.is_integer else None
    if e.op in ("floordiv", "mod"):
        return _divided(e)
    if e.op not in ("add", "mul", "minimum", "maximum", "abs"):
        return None
    inner = [bounds(a) for a in e.args]
    known = [b for b in inner if b is not None]
    if len(known) < len(inner):
        return None
    match e.op:
        case "add" | "minimum" | "maximum":
            low, high = (build(e.op, *(b[side] for b in known)) for side in (0, 1))
            return low, high
        case "mul" if len(known) == 2 and e.args[1].op == "const":
            low, high = (build("mul", value, e.args[1]) for value in known[0])
            return (low, high) if e.args[1].args[0] >= 0 else (high, low)
        case "abs":
            low, high = known[0]
            below = build("mul", high, -1)
            return build("maximum", 0, build("maximum", low, below)), build("maximum", high, build("mul", low, -1))
    return None


def _divided(e: Expr) -> Bounds | None:
    """By a positive whole number: quotients keep the order, remainders too as long as the quotient is one."""
    inner, by = bounds(e.args[0]), e.args[1]
    if inner is None or by.op != "const" or not by.is_integer or by.args[0] < 1:
        return None
    first, last = (build("floordiv", value, by) for value in inner)
    if e.op == "floordiv":
        return first, last
    one = build("eq", first, last)
    low, high = (build("mod", value, by) for value in inner)
    return build("where", one, low, 0), build("where", one, high, by.args[0] - 1)
