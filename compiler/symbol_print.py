"""The text of an expression: one canonical spelling, parentheses only where Python's own precedence needs them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .symbols import Expr

_RANK = {
    "or": 1,
    "and": 2,
    "le": 0,
    "lt": 0,
    "eq": 0,
    "ne": 0,
    "add": 4,
    "mul": 5,
    "truediv": 5,
    "floordiv": 5,
    "mod": 5,
}
_RANK |= {"not": 6, "pow": 7}
_SIGN = {"truediv": "/", "floordiv": "//", "mod": "%", "pow": "**"} | {"le": "<=", "lt": "<", "eq": "==", "ne": "!="}


def printed(e: Expr) -> str:
    """What `parse` reads back."""
    match e.op:
        case "name":
            return str(e.args[0])
        case "const":
            return repr(e.args[0])
        case "lookup":
            table_name = e.args[0] if isinstance(e.args[0], str) else f"table<{id(e.args[0])}>"
            return f"{table_name}[{', '.join(a.text for a in e.args[1:])}]"
        case "add":
            return _print_sum(e)
        case "mul":
            if _number(e.args[1]) == -1 and len(e.args) == 2:
                return f"-{_inside(e.args[0], 6)}"
            return " * ".join(_inside(a, 5 + (k > 0)) for k, a in enumerate(e.args))
        case "and" | "or":
            return (" & " if e.op == "and" else " | ").join(_inside(a, _RANK[e.op] + 1) for a in e.args)
        case "not":
            return f"~{_inside(e.args[0], 7)}"
    if e.op in _SIGN:
        rank = _RANK[e.op]
        return f"{_inside(e.args[0], rank + (e.op == 'pow' or rank == 0))} {_SIGN[e.op]} {_inside(e.args[1], rank + 1)}"
    return f"{e.op}({', '.join(a.text for a in e.args)})"


def _print_sum(e: Expr) -> str:
    text = _inside(e.args[0], 4)
    for arg in e.args[1:]:
        value = arg.args[0] if arg.op == "const" else arg.args[1].args[0] if _has_factor(arg) else None
        if value is not None and value < 0:
            text += f" - {_negated(arg, -value)}"
        else:
            text += f" + {_inside(arg, 4)}"
    return text


def _negated(term: Expr, factor: Any) -> str:
    """A term with its negative factor turned positive."""
    if term.op == "const":
        return repr(factor)
    plain = _inside(term.args[0], 5)
    return plain if factor == 1 and isinstance(factor, int) else f"{plain} * {factor!r}"


def _has_factor(e: Expr) -> bool:
    return e.op == "mul" and len(e.args) == 2 and e.args[1].op == "const"


def _number(e: Expr) -> Any:
    return e.args[0] if e.op == "const" else None


def _inside(e: Expr, rank: int) -> str:
    own = _RANK.get(e.op, 9)
    if e.op == "const" and not isinstance(e.args[0], bool) and e.args[0] < 0:
        own = 4
    if e.op == "mul" and len(e.args) == 2 and _number(e.args[1]) == -1:
        own = 4
    return f"({e.text})" if own < rank or (own == 0 and rank > 0) else e.text
