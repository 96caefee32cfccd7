"""A score that was read falls into a condition and what is left: `where(c, bias, -inf)` keeps c and adds the bias."""

from __future__ import annotations

from ..primitives.attend_spec import FAINT
from ..symbols import FALSE, TRUE, Expr, build, const
from .arithmetic import choose


def split(score: Expr) -> tuple[Expr, Expr]:
    """(keep, score): where keep is false the score was so low that its key has no weight."""
    if score.op == "const":
        value = score.args[0]
        return (FALSE, const(0)) if not isinstance(value, bool) and value <= FAINT else (TRUE, score)
    if score.op == "add":
        keep, parts = TRUE, []
        for part in score.args:
            condition, rest = split(part)
            keep = keep & condition
            parts.append(rest)
        return keep, _sum(parts)
    if score.op == "mul" and len(score.args) == 2 and score.args[1].op == "const" and score.args[1].args[0] > 0:
        keep, rest = split(score.args[0])
        return keep, build("mul", rest, score.args[1])
    if score.op == "where":
        condition, a, b = score.args
        keep_a, a = split(a)
        keep_b, b = split(b)
        keep = (condition & keep_a) | (~condition & keep_b)
        if keep_a.text == FALSE.text:
            return keep, b
        return keep, (a if keep_b.text == FALSE.text else choose(condition, a, b))
    return TRUE, score


def _sum(parts: list[Expr]) -> Expr:
    kept = [p for p in parts if not (p.op == "const" and p.args[0] == 0)]
    if not kept:
        return const(0)
    total = kept[0]
    for part in kept[1:]:
        total = build("add", total, part)
    return total
