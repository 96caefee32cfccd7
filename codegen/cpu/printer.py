"""Expressions as C++: on vectors of keys where `j` or a score is in them, on numbers where not.

A printer that keeps what depends on the row alone prints a name for it: a struct's constructor computes it once.

>>> from ...compiler.symbol_text import parse
>>> cpp(parse("(j <= i) & (i <= j + 7)"), "vb")
'((vi)(all(i) <= (j + all(7))) & (vi)(j <= all(i)))'
>>> box(parse("(j <= i) & (i <= j + 7)"))
'((i1 <= (j0 + -1)) || (j1 <= (i0 + -8))) ? 0 : ((i1 <= (j0 + 7)) && (j1 <= i0)) ? 2 : 1'
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ...compiler.boxes import everywhere, nowhere
from ...compiler.index_steps import steps
from ...compiler.refusal import Refused
from ...compiler.symbols import CORNER_NAMES, Expr

# the type of a printed expression: s one number, v one for every key of a vector; i int32, f float, b truth
_NAMES = {"b": "si", "h": "si", "i": "si", "j": "vi", "s": "vf", "x": "vf"} | dict.fromkeys(CORNER_NAMES, "si")
_COMPARE = {"le": "<=", "lt": "<", "eq": "==", "ne": "!="}
_CALLS = ("exp", "exp2", "log", "tanh", "sigmoid", "softplus", "relu", "elu", "sqrt", "floor", "sin", "cos")


class Line(NamedTuple):
    """Numbers of a table for the keys of a tile: their places, of one key and of a vector of them."""

    table: str
    one: str
    several: str
    one_way: bool  # places never go down and up again


@dataclass
class Row:
    """What is computed once for a row and the keys of a tile, with types, in the order of its names."""

    once: dict[str, str] = field(default_factory=dict)  # c0, c1, ...: what the row decides
    lines: dict[Line, str] = field(default_factory=dict)  # l0, l1, ...: what is looked up along the keys


def cpp(e: Expr, wanted: str, tables: str = "", row: Row | None = None) -> str:
    """The expression as C++ of a type ("vf", "vi", "vb", "si", ...); `tables` says "f" or "i" of each table, `row`
    gathers what the text then has names for.
    """
    return _Printer(tables, row).of(e, wanted)


def learning(at: Expr, into: int, gain: str, by: Expr, tables: str, row: Row) -> str:
    """A statement: what a looked up number has of the loss, `gain` times the derivative `by`, added up in a table."""
    printer = _Printer(tables, row)
    data, places = printer.places(at, f"t[{into}]", "const float*")
    where = f", {places}" if places else ""
    return f"add_at((float*){data}{where}, some_of({gain}, {printer.of(by, 'vf')}));"


def box(predicate: Expr) -> str:
    """Of the box of queries i0..i1 and keys j0..j1: 0 where none is kept, 2 where all are, 1 else."""
    return f"{cpp(nowhere(predicate), 'sb')} ? 0 : {cpp(everywhere(predicate), 'sb')} ? 2 : 1"


class _Printer:
    def __init__(self, tables: str, row: Row | None = None, names: Mapping[str, str] = _NAMES) -> None:
        self.tables, self.row, self.names = tables, row, names

    def of(self, e: Expr, wanted: str) -> str:
        text, kind = self.printed(e)
        return self.converted(text, kind, wanted)

    def converted(self, text: str, kind: str, wanted: str) -> str:
        """The text as another type; a number that becomes a vector is one of the row's, unless it is a constant."""
        found = _converted(text, kind, wanted)
        constant = not any(letter.isalpha() for letter in text.removesuffix("f"))
        return found if kind[0] == wanted[0] or constant else self.once(found, "vf" if wanted[1] == "f" else "vi")

    def once(self, text: str, kind: str) -> str:
        """A name for what the row decides, where such are kept."""
        if self.row is None:
            return text
        self.row.once.setdefault(text, kind)
        return f"c{list(self.row.once).index(text)}"

    def printed(self, e: Expr) -> tuple[str, str]:
        match e.op:
            case "const":
                return _constant(e.args[0])
            case "name":
                if e.args[0] not in self.names:
                    raise Refused(f"`{e.args[0]}` in a kernel", fits=f"known: {', '.join(self.names)}")
                return str(e.args[0]), self.names[e.args[0]]
            case "lookup":
                return self._lookup(e)
            case "and" | "or" | "not":
                return self._logic(e)
            case "where":
                return self._where(e)
        parts = [self.printed(a) for a in (_flat(e) if e.op == "mul" else e.args)]
        width = "v" if any(kind[0] == "v" for _, kind in parts) else "s"
        if e.op in _COMPARE:
            number = _number(parts)
            left, right = (self.converted(text, kind, width + number) for text, kind in parts)
            compared = f"({left} {_COMPARE[e.op]} {right})"
            return (f"(vi){compared}" if width == "v" else compared), f"{width}b"
        if e.op in ("add", "mul"):
            return self._chain(" + " if e.op == "add" else " * ", parts)
        if e.op in ("floordiv", "mod"):
            kind = width + _number(parts)
            kind = "vf" if kind == "sf" else kind
            return f"{e.op}({', '.join(self.converted(t, k, kind) for t, k in parts)})", kind
        if e.op == "truediv":
            left, right = (self.converted(t, k, f"{width}f") for t, k in parts)
            return f"({left} / {right})", f"{width}f"
        return self._call(e, parts)

    def _chain(self, sign: str, parts: Sequence[tuple[str, str]]) -> tuple[str, str]:
        """A sum or a product: numbers first come together among themselves."""
        number = _number(parts)
        one = [self.converted(t, k, f"s{number}") for t, k in parts if k[0] == "s"]
        many = [self.converted(t, k, f"v{number}") for t, k in parts if k[0] == "v"]
        numbers = one[0] if len(one) == 1 else f"({sign.join(one)})"
        if not many:
            return numbers, f"s{number}"
        both = many + [self.converted(numbers, f"s{number}", f"v{number}")] if one else many
        return f"({sign.join(both)})", f"v{number}"

    def _call(self, e: Expr, parts: Sequence[tuple[str, str]]) -> tuple[str, str]:
        """Functions are written for vectors; one of a number is that of a vector of it."""
        if e.op == "pow":
            exponent = e.args[1].args[0] if e.args[1].op == "const" else None
            if isinstance(exponent, int) and 1 <= exponent <= 4:
                text, kind = parts[0]
                return "(" + " * ".join([text] * exponent) + ")", kind
            return f"pow_({', '.join(self.converted(t, k, 'vf') for t, k in parts)})", "vf"
        if e.op in ("minimum", "maximum") and all(kind == "si" for _, kind in parts):
            (left, _), (right, _) = parts
            return f"({left} {'<' if e.op == 'minimum' else '>'} {right} ? {left} : {right})", "si"
        if e.op in ("minimum", "maximum"):
            kind = "v" + _number(parts)
            left, right = (self.converted(t, k, kind) for t, k in parts)
            return f"{e.op}_({left}, {right})", kind
        if e.op == "abs":
            text, kind = parts[0]
            if kind == "si":
                return f"absolute({text})", kind
            kind = "v" + ("f" if kind[1] == "f" else "i")
            return f"absolute({self.converted(*parts[0], kind)})", kind
        if e.op in _CALLS:
            return f"{e.op}_({self.converted(*parts[0], 'vf')})", "vf"
        raise Refused(f"`{e.op}` in a kernel", fits=f"supported: + * / // % ** abs min max where, {', '.join(_CALLS)}")

    def _logic(self, e: Expr) -> tuple[str, str]:
        parts = [self.printed(a) for a in e.args]
        if any(kind[0] == "v" for _, kind in parts):
            texts = [self.converted(t, k, "vb") for t, k in parts]
            return (
                f"(~{texts[0]})" if e.op == "not" else "(" + (" & " if e.op == "and" else " | ").join(texts) + ")"
            ), "vb"
        texts = [self.converted(t, k, "sb") for t, k in parts]
        return (
            f"(!{texts[0]})" if e.op == "not" else "(" + (" && " if e.op == "and" else " || ").join(texts) + ")"
        ), "sb"

    def _where(self, e: Expr) -> tuple[str, str]:
        condition, left, right = (self.printed(a) for a in e.args)
        if condition[1] == "sb" and left[1] == right[1] == "si":
            return f"({condition[0]} ? {left[0]} : {right[0]})", "si"
        kind = "v" + _number([left, right])
        one, other = (self.converted(*part, kind) for part in (left, right))
        return f"select({self.converted(*condition, 'vb')}, {one}, {other})", kind

    def _lookup(self, e: Expr) -> tuple[str, str]:
        number = int(e.args[0][1:])
        table, kind = f"t[{number}]", self.tables[number]
        pointer = f"const {'float' if kind == 'f' else 'int32_t'}*"
        data, at = self.places(e, table, pointer)
        if not at:
            return f"{data}[0]", f"s{kind}"
        line = self._line(e, table, data, at) if self._moving(e) == 1 else None
        if line is None or self.row is None:
            return f"gathered({data}, {at})", f"v{kind}"
        self.row.lines.setdefault(line, pointer)
        return f"load(l{list(self.row.lines).index(line)} + n)", f"v{kind}"

    def places(self, e: Expr, table: str, pointer: str) -> tuple[str, str]:
        """Where a row's numbers of a table begin, and how far behind it those of the keys lie: "" where all are one."""
        plain, moving = [], []
        for axis, index in enumerate(e.args[1:]):
            text, found = self.printed(index)
            whole = self.converted(text, found, found[0] + "i")
            clamp = f"clamped({whole}, {table}.size[{axis}])"
            if found[0] == "v":
                moving.append(f"{clamp} * (int32_t){table}.stride[{axis}]")
            else:
                plain.append(f"{clamp} * {table}.stride[{axis}]")
        data = f"(({pointer}){table}.data + {' + '.join(plain) or '0'})"
        return (self.once(data, pointer), " + ".join(moving)) if moving else (data, "")

    def _moving(self, e: Expr) -> int:
        """How many axes of a table are looked up by what differs from key to key."""
        vectors = {word for word, kind in self.names.items() if kind[0] == "v"}
        return sum(bool(index.names & vectors) for index in e.args[1:])

    def _line(self, e: Expr, table: str, data: str, at: str) -> Line | None:
        """What is looked up by an index that moves along the keys by at most one at a time; None of another one."""
        for axis, index in enumerate(e.args[1:]):
            low, high = steps(index)
            one, kind = _Printer(self.tables, names={**_NAMES, "j": "si"}).printed(index)
            if "j" in index.names and low >= -1 and high <= 1 and kind == "si":
                place = f"clamped({one}, {table}.size[{axis}]) * {table}.stride[{axis}]"
                return Line(data, place, at, one_way=low >= 0 or high <= 0)
        return None


def _constant(value: object) -> tuple[str, str]:
    if isinstance(value, bool):
        return ("true" if value else "false"), "sb"
    if isinstance(value, int):
        return str(value), "si"
    text = repr(float(value))  # type: ignore[arg-type]
    special = {"inf": "INF", "-inf": "(-INF)", "nan": "NAN"}
    return (special[text], "sf") if text in special else (f"{text}f", "sf")


def _flat(e: Expr) -> list[Expr]:
    return [part for factor in e.args for part in (_flat(factor) if factor.op == "mul" else [factor])]


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
