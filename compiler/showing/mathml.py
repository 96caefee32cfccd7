"""LaTeX, as this package writes it, to MathML: browsers draw it without a script and without a font from elsewhere."""

from __future__ import annotations

import re

from .markup import Markup, el

_TOKENS = re.compile(r"\\(?:begin|end)\{(?:aligned|cases)\}|\\\\|\\[a-zA-Z]+|\\.|\d+\.?\d*|[a-zA-Z]|\S")
_SYMBOLS = {
    "cdot": "·", "le": "≤", "ge": "≥", "ne": "≠", "land": "∧", "lor": "∨", "lnot": "¬", "infty": "∞", "top": "⊤",
    "bot": "⊥", "bmod": "mod", "lfloor": "⌊", "rfloor": "⌋", "times": "×", "in": "∈",
}  # fmt: skip
_GREEK = {"phi": "φ", "alpha": "α", "beta": "β", "gamma": "γ", "lambda": "λ", "sigma": "σ", "tau": "τ", "theta": "θ"}
_BIG = {"sum": "∑", "prod": "∏", "max": "max", "min": "min"}
_FUNCTIONS = ("exp", "log", "tanh", "sin", "cos")
_SPACE = {"quad": "1em", ",": "0.2em", ";": "0.3em", " ": "0.3em"}


def mathml(latex: str, *, block: bool = True) -> Markup:
    """A formula; a command that is not known is shown as its name.

    >>> mathml("x_{i} < 2", block=False)
    '<math><mrow><msub><mi>x</mi><mrow><mi>i</mi></mrow></msub><mo>&lt;</mo><mn>2</mn></mrow></math>'
    """
    parser = _Parser(_texts(latex))
    return el("math", parser.row(()), display="block" if block else None)


def _texts(latex: str) -> list[str]:
    r"""Tokens; the inside of \text, \operatorname and \mathit stays whole, behind its command."""
    found: list[str] = []
    at = 0
    for word in re.finditer(r"\\(text|operatorname|mathit)\{([^{}]*)\}", latex):
        found += [*_TOKENS.findall(latex[at : word.start()]), f"\\{word[1]}", word[2]]
        at = word.end()
    return [*found, *_TOKENS.findall(latex[at:])]


class _Parser:
    """Reads tokens once, from left to right."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.at = tokens, 0

    @property
    def next(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self) -> str:
        token = self.next
        self.at += 1
        return token

    def row(self, ends: tuple[str, ...]) -> Markup:
        """Everything up to one of `ends`, which is left standing."""
        parts: list[Markup] = []
        while self.next and self.next not in ends:
            parts.append(self.scripted(self.atom(ends)))
        return el("mrow", *parts)

    def scripted(self, base: tuple[Markup, bool]) -> Markup:
        """What hangs below and above; below a sum stands under it."""
        inner, big = base
        below = above = None
        while self.next in ("_", "^"):
            mark = self.take()
            script = self.group()
            below, above = (script, above) if mark == "_" else (below, script)
        names = ("munder", "mover", "munderover") if big else ("msub", "msup", "msubsup")
        if below is not None and above is not None:
            return el(names[2], inner, below, above)
        if below is None and above is None:
            return inner
        return el(names[0], inner, below) if above is None else el(names[1], inner, above)

    def group(self) -> Markup:
        if self.next != "{":
            return self.atom(())[0]
        self.take()
        inner = self.row(("}",))
        self.take()
        return inner

    def atom(self, ends: tuple[str, ...]) -> tuple[Markup, bool]:
        token = self.take()
        if token == "{":
            inner = self.row(("}",))
            self.take()
            return inner, False
        if token.startswith("\\begin"):
            return self.table(token[7:-1]), False
        if token.startswith("\\"):
            return self.command(token[1:], ends)
        if token[0].isdigit():
            return el("mn", token), False
        return (el("mi", token) if token.isalpha() else el("mo", "−" if token == "-" else token)), False

    def command(self, name: str, ends: tuple[str, ...]) -> tuple[Markup, bool]:
        match name:
            case "text":
                return el("mtext", f" {self.take().strip()} "), False
            case "operatorname" | "mathit":
                return el("mi", self.take(), mathvariant="normal" if name == "operatorname" else None), False
            case "frac":
                return el("mfrac", self.group(), self.group()), False
            case "sqrt":
                return el("msqrt", self.group()), False
            case "substack":
                return self.stack(), False
            case "left":
                return self.fenced(ends), False
        if name in _BIG:
            return el("mo", _BIG[name], movablelimits="false"), True
        if name in _SPACE:
            return el("mspace", width=_SPACE[name]), False
        if name in _FUNCTIONS:
            return el("mi", name), False
        if name in _GREEK:
            return el("mi", _GREEK[name]), False
        return el("mo", _SYMBOLS.get(name, name)), False

    def fenced(self, ends: tuple[str, ...]) -> Markup:
        opening = self.take()
        inner = self.row((*ends, "\\right"))
        closing = ""
        if self.next == "\\right":
            self.take()
            closing = self.take()
        marks = (_SYMBOLS.get(mark.lstrip("\\"), mark.lstrip("\\")) for mark in (opening, closing))
        left, right = (el("mo", mark, stretchy="true") for mark in marks)
        return el("mrow", left, inner, right)

    def stack(self) -> Markup:
        """Conditions under a sum, one below the other."""
        self.take()
        rows = []
        while self.next and self.next != "}":
            rows.append(el("mtr", el("mtd", self.row(("\\\\", "}")))))
            if self.next == "\\\\":
                self.take()
        self.take()
        return el("mtable", *rows, class_="stack")

    def table(self, kind: str) -> Markup:
        end = f"\\end{{{kind}}}"
        rows: list[Markup] = []
        while self.next and self.next != end:
            cells = []
            while True:
                cells.append(el("mtd", self.row(("&", "\\\\", end))))
                if self.next != "&":
                    break
                self.take()
            rows.append(el("mtr", *cells))
            if self.next == "\\\\":
                self.take()
        self.take()
        found = el("mtable", *rows, class_=kind)
        return el("mrow", el("mo", "{", stretchy="true"), found) if kind == "cases" else found
