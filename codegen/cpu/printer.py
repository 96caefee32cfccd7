"""Expressions as C++: on vectors of keys where `j` or a score is in them, on numbers where not, on ranges of indices.

>>> from ...compiler.symbol_text import parse
>>> cpp(parse("(j <= i) & (i <= j + 7)"), "vb")
'((vi)(all(i) <= (j + all(7))) & (vi)(j <= all(i)))'
>>> seen(parse("(j <= i) & (i <= j + 7)"))
('(i1 <= (j0 + 7)) && (j1 <= i0)', '(i0 > (j1 + 7)) || (j0 > i1)')
"""

from __future__ import annotations

from collections.abc import Sequence

from ...compiler.refusal import Refused
from ...compiler.symbols import Expr

# the type of a printed expression: s one number, v one for every key of a vector; i int32, f float, b truth
_NAMES = {"b": "si", "h": "si", "i": "si", "j": "vi", "s": "vf", "x": "vf"}
_COMPARE = {"le": "<=", "lt": "<", "eq": "==", "ne": "!="}
_CALLS = ("exp", "exp2", "log", "tanh", "sigmoid", "softplus", "relu", "elu", "sqrt", "floor", "sin", "cos")


def cpp(e: Expr, wanted: str, tables: str = "") -> str:
    """The expression as C++ of a type ("vf", "vi", "vb", "si", ...); `tables` says "f" or "i" of each table."""
    return _Printer(tables).of(e, wanted)


class _Printer:
    def __init__(self, tables: str) -> None:
        self.tables = tables

    def of(self, e: Expr, wanted: str) -> str:
        text, kind = self.printed(e)
        return _converted(text, kind, wanted)

    def printed(self, e: Expr) -> tuple[str, str]:
        match e.op:
            case "const":
                return _constant(e.args[0])
            case "name":
                if e.args[0] not in _NAMES:
                    raise Refused(f"`{e.args[0]}` in a kernel", fits=f"known: {', '.join(_NAMES)}")
                return str(e.args[0]), _NAMES[e.args[0]]
            case "lookup":
                return self._lookup(e)
            case "and" | "or" | "not":
                return self._logic(e)
            case "where":
                return self._where(e)
        parts = [self.printed(a) for a in e.args]
        width = "v" if any(kind[0] == "v" for _, kind in parts) else "s"
        if e.op in _COMPARE:
            number = _number(parts)
            left, right = (_converted(text, kind, width + number) for text, kind in parts)
            compared = f"({left} {_COMPARE[e.op]} {right})"
            return (f"(vi){compared}" if width == "v" else compared), f"{width}b"
        if e.op in ("add", "mul"):
            number = _number(parts)
            sign = " + " if e.op == "add" else " * "
            return "(" + sign.join(_converted(t, k, width + number) for t, k in parts) + ")", width + number
        if e.op in ("floordiv", "mod"):
            kind = width + _number(parts)
            kind = "vf" if kind == "sf" else kind
            return f"{e.op}({', '.join(_converted(t, k, kind) for t, k in parts)})", kind
        if e.op == "truediv":
            left, right = (_converted(t, k, f"{width}f") for t, k in parts)
            return f"({left} / {right})", f"{width}f"
        return self._call(e, parts)

    def _call(self, e: Expr, parts: Sequence[tuple[str, str]]) -> tuple[str, str]:
        """Functions are written for vectors; one of a number is that of a vector of it."""
        if e.op == "pow":
            exponent = e.args[1].args[0] if e.args[1].op == "const" else None
            if isinstance(exponent, int) and 1 <= exponent <= 4:
                text, kind = parts[0]
                return "(" + " * ".join([text] * exponent) + ")", kind
            return f"pow_({', '.join(_converted(t, k, 'vf') for t, k in parts)})", "vf"
        if e.op in ("minimum", "maximum"):
            kind = "v" + _number(parts)
            left, right = (_converted(t, k, kind) for t, k in parts)
            return f"{e.op}_({left}, {right})", kind
        if e.op == "abs":
            text, kind = parts[0]
            kind = "v" + ("f" if kind[1] == "f" else "i")
            return f"absolute({_converted(*parts[0], kind)})", kind
        if e.op in _CALLS:
            return f"{e.op}_({_converted(*parts[0], 'vf')})", "vf"
        raise Refused(f"`{e.op}` in a kernel", fits=f"supported: + * / // % ** abs min max where, {', '.join(_CALLS)}")

    def _logic(self, e: Expr) -> tuple[str, str]:
        parts = [self.printed(a) for a in e.args]
        if any(kind[0] == "v" for _, kind in parts):
            texts = [_converted(t, k, "vb") for t, k in parts]
            return (
                f"(~{texts[0]})" if e.op == "not" else "(" + (" & " if e.op == "and" else " | ").join(texts) + ")"
            ), "vb"
        texts = [_converted(t, k, "sb") for t, k in parts]
        return (
            f"(!{texts[0]})" if e.op == "not" else "(" + (" && " if e.op == "and" else " || ").join(texts) + ")"
        ), "sb"

    def _where(self, e: Expr) -> tuple[str, str]:
        condition, left, right = (self.printed(a) for a in e.args)
        kind = "v" + _number([left, right])
        return (
            f"select({_converted(*condition, 'vb')}, {_converted(*left, kind)}, {_converted(*right, kind)})",
            kind,
        )

    def _lookup(self, e: Expr) -> tuple[str, str]:
        number = int(e.args[0][1:])
        table, kind = f"t[{number}]", self.tables[number]
        plain, moving = [], []
        for axis, index in enumerate(e.args[1:]):
            text, found = self.printed(index)
            whole = _converted(text, found, found[0] + "i")
            clamp = f"clamped({whole}, {table}.size[{axis}])"
            if found[0] == "v":
                moving.append(f"{clamp} * (int32_t){table}.stride[{axis}]")
            else:
                plain.append(f"{clamp} * {table}.stride[{axis}]")
        data = f"((const {'float' if kind == 'f' else 'int32_t'}*){table}.data + {' + '.join(plain) or '0'})"
        return (f"gathered({data}, {' + '.join(moving)})", f"v{kind}") if moving else (f"{data}[0]", f"s{kind}")


def _constant(value: object) -> tuple[str, str]:
    if isinstance(value, bool):
        return ("true" if value else "false"), "sb"
    if isinstance(value, int):
        return str(value), "si"
    text = repr(float(value))  # type: ignore[arg-type]
    special = {"inf": "INF", "-inf": "(-INF)", "nan": "NAN"}
    return (special[text], "sf") if text in special else (f"{text}f", "sf")


def _number(parts: Sequence[tuple[str, str]]) -> str:
    return "f" if any(kind[1] == "f" for _, kind in parts) else "i"


def _converted(text: str, kind: str, wanted: str) -> str:
    if kind == wanted:
        return text
    width, number, to_width, to_number = *kind, *wanted
    if width == "v" and to_width == "s":
        raise Refused("a value for every key where one for the row is wanted")
    if width == "v":
        if number == "b":  # truth of a vector is 0 or -1
            return f"(-{text})" if to_number == "i" else f"floats(-{text})"
        if to_number == "b":
            return f"(vi)({text} != 0)"
        return f"floats({text})" if to_number == "f" else f"ints({text})"
    if to_number == "b" and number != "b":
        text = f"({text} != 0)"
    elif number != to_number:
        text = f"({'float' if to_number == 'f' else 'int32_t'})({text})"
    if to_width == "s":
        return text
    return f"all(-(int32_t)({text}))" if to_number == "b" else f"all({text})"


def seen(e: Expr) -> tuple[str, str]:
    """Conditions on ranges i0..i1, j0..j1: the predicate surely holds for all of them; it surely holds for none."""
    if e.op == "const":
        return ("true", "false") if e.args[0] else ("false", "true")
    if e.op in ("and", "or"):
        parts = [seen(a) for a in e.args]
        every = _joined([yes for yes, _ in parts], "true" if e.op == "and" else "false")
        none = _joined([no for _, no in parts], "false" if e.op == "and" else "true")
        return every, none
    if e.op == "not":
        yes, no = seen(e.args[0])
        return no, yes
    if e.op in ("le", "lt"):
        left, right = (_range(a) for a in e.args)
        if left and right:
            sure, never = ("<=", ">") if e.op == "le" else ("<", ">=")
            return f"({left[1]} {sure} {right[0]})", f"({left[0]} {never} {right[1]})"
    return "false", "false"


def _joined(conditions: Sequence[str], neutral: str) -> str:
    """All of them (neutral "true") or any of them (neutral "false")."""
    rest = [c for c in conditions if c != neutral]
    absorbing = "false" if neutral == "true" else "true"
    if absorbing in rest:
        return absorbing
    if len(rest) < 2:
        return rest[0] if rest else neutral
    return (" && " if neutral == "true" else " || ").join(rest if neutral == "false" else [_inside(c) for c in rest])


def _inside(condition: str) -> str:
    return f"({condition})" if " || " in condition else condition


def _range(e: Expr) -> tuple[str, str] | None:
    """Least and greatest value of an integer expression over the ranges, as C++; None where it is not affine."""
    if e.op == "name" and e.args[0] in ("i", "j"):
        return f"{e.args[0]}0", f"{e.args[0]}1"
    if e.op == "name" and e.args[0] in ("b", "h"):
        return e.args[0], e.args[0]
    if e.op == "const" and isinstance(e.args[0], int):
        return str(e.args[0]), str(e.args[0])
    if e.op == "add":
        parts = [_range(a) for a in e.args]
        if all(parts):
            return tuple("(" + " + ".join(p[side] for p in parts if p) + ")" for side in (0, 1))  # type: ignore[return-value]
    if e.op == "mul" and len(e.args) == 2 and e.args[1].op == "const" and isinstance(e.args[1].args[0], int):
        inner, factor = _range(e.args[0]), e.args[1].args[0]
        if inner:
            low, high = inner if factor >= 0 else inner[::-1]
            return f"({low} * {factor})", f"({high} * {factor})"
    return None
