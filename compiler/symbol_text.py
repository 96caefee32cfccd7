"""Expressions from their text: the reverse of printing, and the only way text becomes code here (never `eval`)."""

from __future__ import annotations

import ast
import math
from functools import lru_cache

from .refusal import Refused
from .symbols import FUNCTIONS, Expr, build, const, name

_BINARY = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "truediv",
    ast.FloorDiv: "floordiv",
    ast.Mod: "mod",
    ast.Pow: "pow",
    ast.BitAnd: "and",
    ast.BitOr: "or",
}
_COMPARE = {ast.LtE: "le", ast.Lt: "lt", ast.GtE: "ge", ast.Gt: "gt", ast.Eq: "eq", ast.NotEq: "ne"}
_CONSTANTS = {"inf": math.inf, "nan": math.nan}


@lru_cache(maxsize=4096)
def parse(text: str) -> Expr:
    """The expression a text stands for.

    >>> parse("(j <= i) & (t0[b, i] == t0[b, j])")
    (j <= i) & (t0[b, i] == t0[b, j])
    """
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError) as error:
        raise Refused(f"not an expression: {text!r} ({error})") from None
    return _expr(tree.body, text)


def _expr(node: ast.expr, text: str) -> Expr:
    match node:
        case ast.Constant(value=bool() | int() | float() as value):
            return const(value)
        case ast.Name(id=word):
            return const(_CONSTANTS[word]) if word in _CONSTANTS else name(word)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return build(_BINARY[type(op)], _expr(left, text), _expr(right, text))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_expr(operand, text)
        case ast.UnaryOp(op=ast.Invert(), operand=operand):
            return ~_expr(operand, text)
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
            return build(_COMPARE[type(op)], _expr(left, text), _expr(right, text))
        case ast.Subscript(value=ast.Name(id=table), slice=index):
            parts = index.elts if isinstance(index, ast.Tuple) else [index]
            return Expr("lookup", (table, *(_expr(part, text) for part in parts)))
        case ast.Call(func=ast.Name(id=function), args=args, keywords=[]) if function in FUNCTIONS:
            return build(function, *(_expr(arg, text) for arg in args))
    raise Refused(
        f"`{ast.unparse(node)}` in the expression {text!r}", fits="arithmetic, comparisons, lookups, functions"
    )
