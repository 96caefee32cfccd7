"""The derivative of an expression with respect to one name, as an expression: what a gradient kernel is printed from.

Where a function has a corner its derivative is that of torch: relu and abs give 0, minimum and maximum a half each.
"""

from __future__ import annotations

from collections.abc import Callable

from .refusal import Refused
from .symbols import Expr, as_expr, build

ZERO, ONE = as_expr(0), as_expr(1)


def slope(e: Expr, name: str) -> Expr:
    """de / dname.

    >>> from .symbol_text import parse
    >>> slope(parse("s * 0.125 + t0[h, i]"), "s")
    0.125
    >>> slope(parse("tanh(s * 0.5) * 30.0"), "s")
    (-(tanh(s * 0.5) * tanh(s * 0.5)) + 1) * 15.0
    """
    if name not in e.names:
        return ZERO
    if e.op == "name":
        return ONE
    if e.op == "add":
        return build("add", *(slope(a, name) for a in e.args))
    if e.op == "mul":
        return build("add", *(_product(e.args, k, slope(a, name)) for k, a in enumerate(e.args) if name in a.names))
    if e.op == "where":
        condition, a, b = e.args
        return build("where", condition, slope(a, name), slope(b, name))
    if e.op in ("minimum", "maximum"):
        return _either(e, name)
    if e.op == "truediv":
        return _quotient(e.args[0], e.args[1], name)
    if e.op == "pow":
        base, exponent = e.args
        if name not in exponent.names:
            less = build("add", exponent, as_expr(-1))
            return build("mul", exponent, build("pow", base, less), slope(base, name))
    if e.op in _OUTER:
        return build("mul", _OUTER[e.op](e.args[0], e), slope(e.args[0], name))
    raise Refused(f"the derivative of `{e.text}`", fits=f"known: + * / ** min max where, {', '.join(_OUTER)}")


def slope_by(e: Expr, part: Expr) -> Expr:
    """The derivative by what a table holds where an expression looks it up.

    >>> from .symbol_text import parse
    >>> slope_by(parse("s + t0[h] * (j - i)"), parse("t0[h]"))
    -i + j
    """
    return _put(slope(_put(e, part.text, Expr("name", ("x",))), "x"), "x", part)


def _put(e: Expr, text: str, value: Expr) -> Expr:
    """An expression with one of its parts replaced."""
    if e.text == text:
        return value
    if e.op in ("name", "const"):
        return e
    if e.op == "lookup":
        return Expr("lookup", (e.args[0], *(_put(a, text, value) for a in e.args[1:])))
    return build(e.op, *(_put(a, text, value) for a in e.args))


def _product(factors: tuple[Expr, ...], which: int, changed: Expr) -> Expr:
    return build("mul", *(changed if k == which else factor for k, factor in enumerate(factors)))


def _quotient(a: Expr, b: Expr, name: str) -> Expr:
    first = build("truediv", slope(a, name), b)
    if name not in b.names:
        return first
    second = build("truediv", build("mul", a, slope(b, name)), build("mul", b, b))
    return build("add", first, build("mul", as_expr(-1), second))


def _either(e: Expr, name: str) -> Expr:
    a, b = e.args
    da, db = slope(a, name), slope(b, name)
    less = build("lt", a, b) if e.op == "minimum" else build("lt", b, a)
    half = build("mul", build("add", da, db), as_expr(0.5))
    return build("where", less, da, build("where", build("eq", a, b), half, db))


def _sign(x: Expr) -> Expr:
    below = build("where", build("lt", x, ZERO), as_expr(-1.0), as_expr(0.0))
    return build("where", build("lt", ZERO, x), as_expr(1.0), below)


def _one_less(x: Expr) -> Expr:
    return build("add", ONE, build("mul", as_expr(-1), x))


_OUTER: dict[str, Callable[[Expr, Expr], Expr]] = {  # of f(x), from x and f(x)
    "exp": lambda x, f: f,
    "exp2": lambda x, f: build("mul", f, as_expr(0.6931471805599453)),
    "log": lambda x, f: build("truediv", ONE, x),
    "tanh": lambda x, f: _one_less(build("mul", f, f)),
    "sigmoid": lambda x, f: build("mul", f, _one_less(f)),
    "softplus": lambda x, f: build("sigmoid", x),
    "relu": lambda x, f: build("where", build("lt", ZERO, x), as_expr(1.0), as_expr(0.0)),
    "elu": lambda x, f: build("where", build("lt", ZERO, x), as_expr(1.0), build("exp", x)),
    "sqrt": lambda x, f: build("truediv", as_expr(0.5), f),
    "sin": lambda x, f: build("cos", x),
    "cos": lambda x, f: build("mul", as_expr(-1), build("sin", x)),
    "abs": lambda x, f: _sign(x),
    "floor": lambda x, f: ZERO,
}
