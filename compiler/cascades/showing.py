"""A cascade and its verdict for a reader: equations, why each barrier is soft or hard, passes, the loops, LaTeX."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ..symbol_math import latex
from ..symbol_text import parse
from ..symbols import Expr
from .analysis import Verdict
from .barriers import correction
from .einsum import Cascade, Node

if TYPE_CHECKING:
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


# --- the loop nest ----------------------------------------------------------------------------------------------------


def nest_text(nest: LoopNest) -> str:
    """The loops as they run: what a tile computes, and how the state takes it in."""
    lines = []
    for turn in range(1, nest.passes + 1):
        backwards = ", last tile first" if nest.reverse else ""
        lines.append(f"for each tile of {nest.rank}{backwards}:  # pass {turn} of {nest.passes}")
        inner = [n for n in nest.cascade.needed(nest.cascade.outputs) if _inside(nest, n, turn)]
        lines += [f"    {_line(nest, node)}" for node in inner] or ["    pass"]
    lines += [str(n) for n in nest.cascade.needed(nest.cascade.outputs) if _outside(nest, n)]
    way = nest.in_order and f"tiles follow each other: {nest.in_order}"
    order = "in any order" if nest.commutes else "of neighbours"
    lines.append(f"# {way or f'states merge associatively, {order}'}")
    return "\n".join(lines)


def _inside(nest: LoopNest, node: Node, turn: int) -> bool:
    return nest.turn[node.name] == turn and nest.rank in nest.cascade.space(node)


def _outside(nest: LoopNest, node: Node) -> bool:
    return nest.rank not in nest.cascade.space(node)


def _line(nest: LoopNest, node: Node) -> str:
    own = nest.sums.get(node.name)
    if own is None:
        return str(node)
    if own.terms:
        parts = [f"{node.monoid}({t.summed}) * ({t.times})" for t in own.terms]
        return f"{node.name} += {' + '.join(parts)}, each sum by itself"
    moved = f"{node.name} * {correction(own.change)}" if own.change.kind == "S" else node.name
    if own.change.kind == "A":
        moved = f"{node.name} + {correction(own.change)}"
    if node.monoid == "sum":
        return f"{node.name} = {moved} + {node.right}"
    return f"{node.name} = {node.monoid}({moved}, {node.right})"


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
