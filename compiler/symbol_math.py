"""Expressions for mathematics: as sympy where algebra is wanted, as LaTeX where a formula is shown.

sympy evaluates and reorders; the expressions here do not. Nothing comes back from sympy into a spec.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy

from .refusal import Refused
from .symbols import INTEGER_NAMES, Expr

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": sympy.Add,
    "mul": sympy.Mul,
    "truediv": lambda a, b: a / b,
    "floordiv": lambda a, b: sympy.floor(a / b),
    "mod": sympy.Mod,  # of the divisor's sign, as in Python
    "pow": sympy.Pow,
    "and": sympy.And,
    "or": sympy.Or,
    "not": sympy.Not,
    "le": sympy.Le,
    "lt": sympy.Lt,
    "eq": sympy.Eq,
    "ne": sympy.Ne,
    "exp": sympy.exp,
    "exp2": lambda a: sympy.Integer(2) ** a,
    "log": sympy.log,
    "tanh": sympy.tanh,
    "sigmoid": lambda a: 1 / (1 + sympy.exp(-a)),
    "softplus": lambda a: sympy.log(1 + sympy.exp(a)),
    "relu": lambda a: sympy.Max(a, 0),
    "elu": lambda a: sympy.Piecewise((a, a > 0), (sympy.exp(a) - 1, True)),
    "sqrt": sympy.sqrt,
    "floor": sympy.floor,
    "sin": sympy.sin,
    "cos": sympy.cos,
    "abs": sympy.Abs,
    "minimum": sympy.Min,
    "maximum": sympy.Max,
    "where": lambda c, a, b: sympy.Piecewise((a, c), (b, True)),
}


def to_sympy(expr: Expr) -> Any:
    """The expression over sympy symbols: i, j, b, h, N, M are integers, the others real; a lookup is an Indexed.

    >>> from .symbol_text import parse
    >>> to_sympy(parse("(j <= i) & (t0[b, i] == t0[b, j])"))
    (j <= i) & Eq(t0[b, i], t0[b, j])
    >>> sympy.simplify(to_sympy(parse("exp(s) / (1 + exp(s))")) - to_sympy(parse("sigmoid(s)")))
    0
    """
    match expr.op:
        case "name":
            return _symbol(expr.args[0])
        case "const":
            return _constant(expr.args[0])
        case "lookup":
            return _base(expr)[tuple(to_sympy(a) for a in expr.args[1:])]
    if expr.op not in _FUNCTIONS:
        raise Refused(f"operator {expr.op!r} in sympy", fits=f"known: {', '.join(sorted(_FUNCTIONS))}")
    return _FUNCTIONS[expr.op](*(to_sympy(a) for a in expr.args))


def _symbol(text: str) -> Any:
    return sympy.Symbol(text, integer=True) if text in INTEGER_NAMES else sympy.Symbol(text, real=True)


def _constant(value: float | int | bool) -> Any:
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return sympy.Integer(int(value))
    return sympy.sympify(value)


def _base(expr: Expr) -> Any:
    table = expr.args[0]
    return sympy.IndexedBase(table if isinstance(table, str) else "t", real=True)


# --- LaTeX: written from the expression itself, in its own order, so that it does not change with sympy's version -----

_RANK = {"or": 1, "and": 2, "le": 3, "lt": 3, "eq": 3, "ne": 3, "add": 4, "mul": 5, "not": 6, "pow": 7}
_BETWEEN = {"and": r" \land ", "or": r" \lor ", "le": r" \le ", "lt": " < ", "eq": " = ", "ne": r" \ne "}
_NAMED = {f: "\\" + f for f in ("exp", "log", "tanh", "sin", "cos")} | {"minimum": r"\min", "maximum": r"\max"}
_SHAPES = {
    "truediv": r"\frac{%s}{%s}",
    "floordiv": r"\left\lfloor \frac{%s}{%s} \right\rfloor",
    "floor": r"\left\lfloor %s \right\rfloor",
    "abs": r"\left| %s \right|",
    "sqrt": r"\sqrt{%s}",
    "exp2": "2^{%s}",
    "where": r"\begin{cases} %s & \text{if } %s \\ %s & \text{otherwise} \end{cases}",
}


def latex(expr: Expr) -> str:
    r"""The formula of an expression, in the order in which its text has it.

    >>> from .symbol_text import parse
    >>> latex(parse("(j <= i) & (i // 4 == j // 4)"))
    '\\left\\lfloor \\frac{i}{4} \\right\\rfloor = \\left\\lfloor \\frac{j}{4} \\right\\rfloor \\land j \\le i'
    >>> latex(parse("s * 0.125 - t0[h] * (i - j)"))
    '-\\left(i - j\\right) t_{0}[h] + 0.125 s'
    """
    match expr.op:
        case "name":
            return _letter(expr.args[0])
        case "const":
            return _number(expr.args[0])
        case "lookup":
            table = expr.args[0] if isinstance(expr.args[0], str) else "t"
            return f"{_letter(table)}[{', '.join(latex(a) for a in expr.args[1:])}]"
        case "add":
            return _sum(expr)
        case "mul":
            return _product(expr.args)
        case "mod":
            return f"{_inside(expr.args[0], 6)} \\bmod {_inside(expr.args[1], 6)}"
        case "not":
            return f"\\lnot {_inside(expr.args[0], 6)}"
        case "pow":
            return f"{_inside(expr.args[0], 8)}^{{{latex(expr.args[1])}}}"
        case "where":
            condition, a, b = expr.args
            return _SHAPES["where"] % (latex(a), latex(condition), latex(b))
    if expr.op in _SHAPES:
        return _SHAPES[expr.op] % tuple(latex(a) for a in expr.args)
    if expr.op in _BETWEEN:
        return _BETWEEN[expr.op].join(_inside(a, _RANK[expr.op] + 1) for a in expr.args)
    function = _NAMED.get(expr.op, f"\\operatorname{{{expr.op}}}")
    return f"{function}\\left({', '.join(latex(a) for a in expr.args)}\\right)"


def _letter(text: str) -> str:
    head = text.rstrip("0123456789")
    return f"{head}_{{{text[len(head) :]}}}" if head != text and head else text


def _number(value: float | int | bool) -> str:
    if isinstance(value, bool):
        return r"\top" if value else r"\bot"
    if isinstance(value, float) and not math.isfinite(value):
        return r"\text{nan}" if math.isnan(value) else r"\infty" if value > 0 else r"-\infty"
    mantissa, e, power = repr(value).partition("e")
    return f"{mantissa} \\cdot 10^{{{int(power)}}}" if e else mantissa


def _sum(expr: Expr) -> str:
    text = ""
    for arg in expr.args:
        term = _inside(arg, 4)
        text += term if not text else f" - {term[1:].lstrip()}" if term.startswith("-") else f" + {term}"
    return text


def _product(args: tuple[Expr, ...]) -> str:
    """The number first, -1 as a sign."""
    number = args[-1].args[0] if args[-1].op == "const" else None
    rest = " ".join(_inside(a, 5) for a in (args if number is None else args[:-1]))
    if number is None:
        return rest
    return f"-{rest}" if number == -1 and isinstance(number, int) else f"{_number(number)} {rest}"


def _inside(expr: Expr, rank: int) -> str:
    negative = expr.op == "mul" and expr.args[-1].op == "const" and expr.args[-1].args[0] < 0
    negative = negative or (expr.op == "const" and not isinstance(expr.args[0], bool) and expr.args[0] < 0)
    own = 4 if negative else 5 if expr.op == "mod" else _RANK.get(expr.op, 9)
    return f"\\left({latex(expr)}\\right)" if own < rank else latex(expr)
