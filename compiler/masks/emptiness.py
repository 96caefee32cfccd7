"""Whether every query keeps a key, whatever the data: then no fill of the model's mask ever shows."""

from __future__ import annotations

import math

from ..primitives.attend_spec import FAINT
from ..symbols import TRUE, Expr, const
from .index_space import I, IndexSpace, simplify_indices


def never_empty(keep: Expr, space: IndexSpace) -> bool:
    """A witness is looked for: the first key, the query's own, the one that stands where the query does at the end.

    >>> from ..symbol_text import parse
    >>> never_empty(parse("(j <= i) & (t0[b, i] == t0[b, j])"), IndexSpace(keys=IndexSpace().queries))
    True
    >>> never_empty(parse("(j <= i) & (t0[b, j] != 0)"), IndexSpace(keys=IndexSpace().queries))
    False
    """
    shift = space.keys - space.queries
    witnesses = [const(0)]
    if space.never_negative(shift):
        witnesses += [I, I + shift]
    return any(simplify_indices(keep.replace({"j": w}), space).text == TRUE.text for w in witnesses)


def has_finite_fill(score: Expr) -> bool:
    """Whether a number that only lowers a score stands in it."""
    return any(_lowers(e) for e in score.walk() if e.op == "const")


def _lowers(e: Expr) -> bool:
    value = e.args[0]
    return not isinstance(value, bool) and math.isfinite(value) and value <= FAINT
