"""Keys in blocks of one size, each spoken for by its last key: read off the `leader` of a two-level softmax.

>>> found = even_groups("where(i // 4 == j // 4, j, j // 4 * 4 + 3)")
>>> found.size, found.alone.text
(4, 'i // 4 == j // 4')
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .symbol_eval import evaluate
from .symbol_text import parse
from .symbols import FALSE, Expr, name


@dataclass(frozen=True)
class Groups:
    """Blocks of `size` keys from the first on; their last ones lead, and keys lead themselves where `alone` holds."""

    size: int
    alone: Expr


@lru_cache(maxsize=256)
def even_groups(leader: str) -> Groups | None:
    """The blocks of a leader that is j itself or the last of j's block; None where it is anything else."""
    if not leader:
        return None
    e = parse(leader)
    alone, last = FALSE, e
    if e.op == "where":
        condition, one, other = e.args
        if name("j").text not in (one.text, other.text):
            return None
        alone, last = (condition, other) if one.text == "j" else (~condition, one)
    if last.names != {"j"} or any(part.op == "lookup" for part in last.walk()):
        return None
    size = int(evaluate(last, {"j": 0}, {})) + 1
    if size < 1 or last.text != (name("j") // size * size + (size - 1)).text:
        return None
    return Groups(size, alone)
