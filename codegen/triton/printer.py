"""Expressions as Triton: numbers, rows and tiles broadcast by themselves, so that only the kind of number is tracked.

>>> from ...compiler.symbol_text import parse
>>> triton_text(parse("(j <= i) & (i <= j + 7)"), "b", {"i": "i[:, None]", "j": "j[None, :]"})
'((i[:, None] <= (j[None, :] + 7)) & (j[None, :] <= i[:, None]))'
>>> triton_text(parse("s * 0.125 + t0[h]"), "f", tables="f")
'((s * 0.125) + look(t0, at(h, t0_size0) * t0_step0))'
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...compiler.refusal import Refused
from ...compiler.symbols import INTEGER_NAMES, Expr, as_expr, build

# the kind of a printed expression: i int32, f float32, b truth
_COMPARE = {"le": "<=", "lt": "<", "eq": "==", "ne": "!="}
_CALLS = ("log", "tanh", "softplus", "relu", "elu", "sqrt", "floor", "sin", "cos", "exp", "exp2", "sigmoid")
_OWN = frozenset({"tanh", "softplus", "relu", "elu"})  # functions that stand in front of the skeletons
_IN_POWERS = {
    "exp": "tl.exp2",
    "log": "tl.log2",
    "softplus": "softplus2",
    "sigmoid": "sigmoid2",
}  # where scores are in powers of two
_LARGEST_POWER = 8  # that is written as products


def triton_text(e: Expr, wanted: str, names: Mapping[str, str] = {}, *, tables: str = "", powers: bool = False) -> str:
    """The expression as Triton of a kind; `names` says how names are spelled, `tables` "f" or "i" of each table.

    `powers`: scores are logarithms of base two, so exp, log and softplus are those of that base.
    """
    return _Printer(names, tables, powers).of(e, wanted)


class _Printer:
    def __init__(self, names: Mapping[str, str], tables: str, powers: bool) -> None:
        self.names, self.tables, self.powers = names, tables, powers

    def of(self, e: Expr, wanted: str) -> str:
        return _converted(*self.printed(e), wanted)

    def printed(self, e: Expr) -> tuple[str, str]:
        match e.op:
            case "const":
                return _constant(e.args[0])
            case "name":
                word = str(e.args[0])
                return self.names.get(word, word), "i" if word in INTEGER_NAMES else "f"
            case "lookup":
                return self._lookup(e)
            case "and" | "or":
                sign = " & " if e.op == "and" else " | "
                return "(" + sign.join(self.of(a, "b") for a in e.args) + ")", "b"
            case "not":
                return f"(~{self.of(e.args[0], 'b')})", "b"
            case "where":
                condition, left, right = (self.printed(a) for a in e.args)
                kind = _number((left, right))
                return f"tl.where({condition[0]}, {_converted(*left, kind)}, {_converted(*right, kind)})", kind
        parts = [self.printed(a) for a in e.args]
        if e.op in _COMPARE:
            left_text, right_text = (_converted(*part, _number(parts)) for part in parts)
            return f"({left_text} {_COMPARE[e.op]} {right_text})", "b"
        if e.op == "add":
            return self._sum(e)
        if e.op == "mul":
            kind = _number(parts)
            return "(" + " * ".join(_converted(*p, kind) for p in parts) + ")", kind
        if e.op == "truediv":
            left_text, right_text = (_converted(*part, "f") for part in parts)
            return f"({left_text} / {right_text})", "f"
        return self._call(e, parts)

    def _sum(self, e: Expr) -> tuple[str, str]:
        """What is added, then what is taken away."""
        taken = [_negated(a) for a in e.args]
        added = [self.printed(a) for a, less in zip(e.args, taken, strict=True) if less is None]
        less = [self.printed(a) for a in taken if a is not None]
        kind = _number([*added, *less])
        text = " + ".join(_converted(*p, kind) for p in added)
        text += "".join(f" - {_converted(*p, kind)}" for p in less)
        return f"({text.strip()})", kind

    def _call(self, e: Expr, parts: Sequence[tuple[str, str]]) -> tuple[str, str]:
        if e.op in ("minimum", "maximum", "floordiv", "mod"):
            kind = _number(parts)
            word = e.op if kind == "f" or e.op in ("floordiv", "mod") else f"tl.{e.op}"
            return f"{word}({', '.join(_converted(*p, kind) for p in parts)})", kind
        if e.op == "abs":
            return f"tl.abs({parts[0][0]})", parts[0][1]
        if e.op == "pow":
            return self._power(e, parts)
        if e.op in _CALLS:
            word = _IN_POWERS.get(e.op, "") if self.powers else ""
            return f"{word or (e.op if e.op in _OWN else f'tl.{e.op}')}({_converted(*parts[0], 'f')})", "f"
        raise Refused(f"`{e.op}` in a kernel", fits=f"supported: + * / // % ** abs min max where, {', '.join(_CALLS)}")

    def _power(self, e: Expr, parts: Sequence[tuple[str, str]]) -> tuple[str, str]:
        exponent = e.args[1].args[0] if e.args[1].op == "const" else None
        text, kind = parts[0]
        if exponent is not None and float(exponent).is_integer() and 1 <= exponent <= _LARGEST_POWER:
            return "(" + " * ".join([text] * int(exponent)) + ")", kind
        base, power = (_converted(*part, "f") for part in parts)
        return f"tl.exp2({power} * tl.log2({base}))", "f"

    def _lookup(self, e: Expr) -> tuple[str, str]:
        table = str(e.args[0])
        kind = self.tables[int(table[1:])]
        steps = [
            f"at({_converted(*self.printed(index), 'i')}, {table}_size{axis}) * {table}_step{axis}"
            for axis, index in enumerate(e.args[1:])
        ]
        look = "look" if kind == "f" else "look_whole"
        return f"{look}({table}, {' + '.join(steps)})", kind


def _negated(term: Expr) -> Expr | None:
    """A term with a negative factor, without the sign."""
    if term.op == "const" and not isinstance(term.args[0], bool) and term.args[0] < 0:
        return as_expr(-term.args[0])
    if term.op == "mul" and term.args[-1].op == "const" and term.args[-1].args[0] < 0:
        return (
            build("mul", *term.args[:-1], as_expr(-term.args[-1].args[0]))
            if term.args[-1].args[0] != -1
            else (build("mul", *term.args[:-1]) if len(term.args) > 2 else term.args[0])
        )
    return None


def _constant(value: object) -> tuple[str, str]:
    if isinstance(value, bool):
        return str(value), "b"
    if isinstance(value, int):
        return str(value), "i"
    text = repr(float(value))  # type: ignore[arg-type]
    return (f'float("{text}")' if text in ("inf", "-inf", "nan") else text), "f"


def _number(parts: Sequence[tuple[str, str]]) -> str:
    return "f" if any(kind == "f" for _, kind in parts) else "i"


def _converted(text: str, kind: str, wanted: str) -> str:
    if kind == wanted:
        return text
    if wanted == "b":
        return f"({text} != 0)"
    if kind == "b":
        return f"tl.where({text}, {'1.0, 0.0' if wanted == 'f' else '1, 0'})"
    if text.lstrip("-").isdigit():
        return f"{text}.0"
    return f"tl.cast({text}, {'tl.float32' if wanted == 'f' else 'tl.int32'})"
