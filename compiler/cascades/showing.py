"""A cascade and its verdict for a reader: equations, why each barrier is soft or hard, passes, the loops, LaTeX."""

from __future__ import annotations

import re

from ..symbol_math import latex
from ..symbol_text import parse
from ..symbols import Expr
from .analysis import Verdict
from .einsum import Cascade, Node
from .nest import LoopNest

_BIG = {"sum": r"\sum", "max": r"\max", "min": r"\min", "prod": r"\prod"}


def verdict_text(found: Verdict) -> str:
    """Everything about one cascade."""
    lines = [*_titled("cascade", str(found.cascade).splitlines())]
    barriers = [line for b in found.barriers for line in (str(b), *_corrected(b.corrections))]
    lines += _titled("barriers", barriers or ["none"])
    lines += _titled("passes", [*map(str, found.readings), f"sweeps as written: {found.sweeps}"])
    lines += [f"category   {found.category}"]
    lines += [f"footprint  {found.written} as written, {found.running} running"]
    if found.unsafe:
        lines += ["warning    an exponential is summed that nothing bounds: it can overflow"]
    return "\n".join(lines)


def _titled(title: str, lines: list[str]) -> list[str]:
    return [title, *(f"  {line}" for line in lines)]


def _corrected(corrections: tuple[tuple[str, str], ...]) -> list[str]:
    return [f"  {name}: {factor}" for name, factor in corrections]


# --- LaTeX ------------------------------------------------------------------------------------------------------------


def cascade_latex(cascade: Cascade) -> str:
    r"""The equations, aligned.

    >>> from .reading import read_cascade
    >>> print(cascade_latex(read_cascade("in A[k], B[k]; Y[] = sum[k](A * B); out Y")))
    \begin{aligned}
    Y &= \sum_{k} A_{k} B_{k}
    \end{aligned}
    """
    lines = [f"{_indexed(cascade, n.name)} &= {_right(cascade, n)}" for n in cascade.nodes]
    return "\n".join((r"\begin{aligned}", " \\\\\n".join(lines), r"\end{aligned}"))


def _right(cascade: Cascade, node: Node) -> str:
    inner = _subscripted(cascade, node.text)
    over = ", ".join(node.over)
    if node.keep:
        over = rf"\substack{{{over} \\ {latex(parse(node.keep))}}}"
    wrapped = rf"\left({inner}\right)" if node.expr.op == "add" else inner
    match node.kind:
        case "map":
            return inner + (rf" \quad \text{{if }} {latex(parse(node.keep))}" if node.keep else "")
        case "reduce":
            return f"{_BIG[node.monoid]}_{{{over}}} {wrapped}"
        case "scan":
            rank = node.over[0]
            sign = (">" if node.reverse else "<") + ("" if node.before else "=")
            order = {">": ">", "<": "<", ">=": r"\ge", "<=": r"\le"}[sign]
            decay = f" \\text{{ decayed by }} {_subscripted(cascade, node.decay)}" if node.decay else ""
            return f"{_BIG[node.monoid]}_{{{rank}' {order} {rank}}} {wrapped}{decay}"
    also = "".join(f", {_indexed(cascade, n)}" for n in node.also)
    return rf"\text{{{node.called.replace('_', ' ')}}}_{{{over}}}\left({inner}{also}\right)"


def _subscripted(cascade: Cascade, text: str) -> str:
    """LaTeX of an expression whose tensors carry their ranks."""
    expr = parse(text)
    shown = latex(_marked(expr, cascade))
    return re.sub(r"([A-Za-z]+)_?\{?(\d*)\}?TENSOR", lambda m: _indexed(cascade, m[1] + m[2]), shown)


def _marked(expr: Expr, cascade: Cascade) -> Expr:
    return expr.replace({n: Expr("name", (f"{n}TENSOR",)) for n in expr.names if n in cascade.ranks})


def _indexed(cascade: Cascade, name: str) -> str:
    head = name.rstrip("0123456789")
    tail = name[len(head) :]
    letter = head if len(head) == 1 else rf"\mathit{{{head}}}"
    ranks = [r for r in cascade.ranks[name] if r not in ("b", "h")]
    marks = [tail] if tail else []
    below = ", ".join(marks + ranks)
    return f"{letter}_{{{below}}}" if below else letter


def math_text(found: Verdict, nest: LoopNest) -> str:
    """All of it: the verdict, the loops, LaTeX."""
    return "\n".join(
        (verdict_text(found), *_titled("loops", str(nest).splitlines()), "latex", cascade_latex(found.cascade))
    )
