"""Which keys a query can reach, read off a predicate: a band i - back <= j <= i + ahead, and the first few keys.

Decoding asks it forwards: the keys that no later query can reach need not be kept. What is kept is a ring, its rows the
sinks and then the latest keys in order; the row numbers are also positions wherever a score knows only i - j.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .primitives.attend_spec import AttendSpec
from .symbol_text import parse
from .symbols import Expr

Size = Any  # an int, or a symbolic one while a graph is traced


@dataclass(frozen=True)
class Reach:
    """Where the keys of query i can lie: i - back <= j <= i + ahead, and the first `sinks`; None: no bound there."""

    back: int | None = None
    ahead: int | None = None
    sinks: int = 0

    @property
    def kept(self) -> int | None:
        """How many keys a query that is yet to come can reach at most; None: all."""
        return None if self.back is None else self.sinks + max(self.back, 0)

    def within(self, other: Reach) -> bool:
        """Whether everything reached here is reached there too, looking back."""
        if other.back is None:
            return True
        return self.back is not None and self.back <= other.back and self.sinks <= other.sinks


@lru_cache(maxsize=1024)
def reach(text: str) -> Reach:
    """Bounds that follow from a predicate's conditions; a condition that is not understood bounds nothing.

    >>> reach('{"score": "s", "keep": "((i <= j + 5) | (j <= 1)) & (j <= i)"}')
    Reach(back=5, ahead=0, sinks=2)
    """
    back: int | None = None
    ahead: int | None = None
    sinks = 0
    for condition in AttendSpec.of(text).conjuncts:
        first, second = _halves(condition)
        bound = _offset(first)
        if bound is None:
            continue
        side, width = bound
        if second is None and side == "ahead":
            ahead = width if ahead is None else min(ahead, width)
        elif second is None:
            back = width if back is None or sinks else min(back, width)
            sinks = 0  # a plain bound is at least as tight as one with sinks
        elif side == "back" and back is None and _is_sink(second):
            back, sinks = width, int(second.args[1].args[0]) + 1
    return Reach(back, ahead, sinks)


def kept_keys(length: Size, spec: AttendSpec | Reach, device: torch.device | None = None) -> Tensor | None:
    """Rows of `length` that a later query can still reach: the first `sinks` and the last `back`; None: all of them.

    >>> kept_keys(9, Reach(back=3, ahead=0, sinks=2))
    tensor([0, 1, 6, 7, 8])
    >>> kept_keys(4, Reach(back=3, ahead=0, sinks=2))
    tensor([0, 1, 2, 3])
    """
    bound = spec if isinstance(spec, Reach) else reach(spec.text)
    if bound.kept is None:
        return None
    count = torch.sym_min(length, bound.kept)
    return _behind_sinks(torch.arange(count, device=device), bound.sinks, length - count)


def key_positions(rows: Size, seen: Size, new: Size, bound: Reach, device: torch.device | None = None) -> Tensor:
    """Logical positions of a ring's rows, `new` ones at its end included, when `seen` keys have come before those.

    >>> key_positions(6, 20, 1, Reach(back=3, ahead=0, sinks=2))
    tensor([ 0,  1, 17, 18, 19, 20])
    """
    return _behind_sinks(torch.arange(rows, device=device), bound.sinks, seen + new - rows)


def _behind_sinks(rows: Tensor, sinks: int, gone: Size) -> Tensor:
    """Row numbers with those that are gone counted in; as long as none is, rows are positions."""
    return torch.where(rows < sinks, rows, rows + gone)


@lru_cache(maxsize=1024)
def moves_freely(text: str) -> bool:
    """Whether only i - j and the sinks count: then row numbers that end where i ends say the same as positions."""
    spec = AttendSpec.of(text)
    if AttendSpec(spec.score, spec.keep, spec.weight, spec.normaliser, spec.eps, spec.sink, spec.after, spec.align,
                  kv_heads=spec.kv_heads, outputs=spec.outputs).text != text:  # fmt: skip
        return False
    placed = [parse(part) for part in (spec.score, spec.weight, spec.sink, spec.after) if part]
    if spec.outputs != ("o",) or any(e.names & {"i", "j", "N", "M"} for e in placed):
        return False
    sinks = reach(text).sinks
    for condition in spec.conjuncts:
        first, second = _halves(condition)
        if _offset(first) is None:
            return False
        if second is not None and not (_is_sink(second) and int(second.args[1].args[0]) + 1 == sinks):
            return False
    return True


def _halves(condition: Expr) -> tuple[Expr, Expr | None]:
    """A bound, and what beside it lets a key be seen."""
    first, second = condition.args if condition.op == "or" and len(condition.args) == 2 else (condition, None)
    if second is not None and _offset(first) is None:
        first, second = second, first
    return first, second


def _offset(condition: Expr) -> tuple[str, int] | None:
    """("back", w) for i <= j + w, ("ahead", w) for j <= i + w."""
    if condition.op != "le":
        return None
    left, right = condition.args
    constant = 0
    if right.op == "add" and len(right.args) == 2 and right.args[1].op == "const":
        right, constant = right.args[0], int(right.args[1].args[0])
    side = {("i", "j"): "back", ("j", "i"): "ahead"}.get((left.text, right.text))
    return None if side is None else (side, constant)


def _is_sink(condition: Expr) -> bool:
    return condition.op == "le" and condition.args[0].text == "j" and condition.args[1].op == "const"
