"""The text form of one `attend`: what is kept, how scores become weights, what comes out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from ..refusal import Refused, nearest
from ..symbol_text import parse
from ..symbols import TRUE, Expr, name
from .spec import Spec

NORMALISERS = ("softmax", "sum", "none", "stick", "grouped")
OUTPUTS = ("o", "lse", "logits", "weights", "colsum", "colmean", "colmax", "entropy")
COUNTED = ("topk", "slab")  # outputs with a number behind: topk:8, slab:16


@dataclass(frozen=True)
class AttendSpec(Spec):
    """Empty texts mean: everything is kept, the plain weight, nothing afterwards."""

    score: str
    keep: str = ""
    weight: str = ""
    normaliser: str = "softmax"
    eps: float = 0.0
    sink: str = ""
    after: str = ""
    align: str = "start"  # "end": query i stands at position i + M - N
    q_positions: str = ""  # name of a table (N,), (B, N) or (B, H, N)
    k_positions: str = ""  # name of a table (M,), (B, M) or (B, H|Hkv, M)
    more: tuple[tuple[str, str, str], ...] = ()  # further segments: keep, score, k_positions
    rows: tuple[str, ...] = ()  # per segment a table of key rows (B, H, L) or (B, H, N, L), or "" for all in order
    relative: tuple[tuple[str, str, str], ...] = ()  # r0, r1, ... in scores: table (H|1, L, D), index, "q" or "k"
    tiles: tuple[str, int, int] | tuple[()] = ()  # table (B|1, H|1, Tq, L) of key tiles, rows of q and of k per tile
    kv_heads: str = ""  # name of a table (H,): the key head of every query head
    leader: str = ""  # of key j, for "grouped": the position of the key that speaks for its group
    empty: str = ""  # the score of all keys for a query that keeps none above FAINT; without it such a query gives 0
    stored: tuple[tuple[int | str, ...], ...] = ()  # of every k and v: bits, dim, group, dtype of rows of bytes, or ()
    group_rows: str = ""  # name of a table (G, S) of rows: a sample of q is a group of rows of k, v (attend_grouped)
    outputs: tuple[str, ...] = ("o",)

    @cached_property
    def keep_expr(self) -> Expr:
        return parse(self.keep) if self.keep else TRUE

    @cached_property
    def score_expr(self) -> Expr:
        return parse(self.score)

    @cached_property
    def empty_expr(self) -> Expr | None:
        return parse(self.empty) if self.empty else None

    @property
    def segments(self) -> tuple[tuple[str, str, str], ...]:
        """(keep, score, k_positions) of every segment."""
        return ((self.keep, self.score, self.k_positions), *self.more)

    def rows_of(self, segment: int) -> str:
        return self.rows[segment] if segment < len(self.rows) else ""

    @property
    def conjuncts(self) -> tuple[Expr, ...]:
        """The predicate as a list of conditions that must all hold."""
        e = self.keep_expr
        return e.args if e.op == "and" else (() if e.text == TRUE.text else (e,))

    @property
    def scale(self) -> float | None:
        """The factor on q.k: of all plain numbers that it is multiplied with or divided by, a bias or softcap between
        them or not; None where another factor is no plain number."""
        return _factor(self.score_expr)

    @property
    def is_causal(self) -> bool:
        return any(c.text == CAUSAL for c in self.conjuncts)


def _factor(e: Expr) -> float | None:
    if e.text == "s":
        return 1.0
    inner = [a for a in e.args if isinstance(a, Expr) and "s" in a.names]
    below = _factor(inner[0]) if len(inner) == 1 else None
    if below is None or e.op in ("add", "tanh", "where"):
        return below
    others = [a for a in e.args if a is not inner[0]]
    if not all(a.op == "const" for a in others):
        return None
    if e.op == "truediv" and e.args[0] is inner[0]:
        return below / float(others[0].args[0])
    return below * math.prod(float(a.args[0]) for a in others) if e.op == "mul" else None


def keep_text(keep: Expr) -> str:
    """A predicate as a spec says it: nothing where it keeps everything."""
    return "" if keep.text == TRUE.text else keep.text


def count_of(output: str) -> tuple[str, int]:
    """An output's kind and its number: ("topk", 8) for "topk:8", 0 where it takes none."""
    kind, colon, number = output.partition(":")
    if (kind in COUNTED) != bool(colon) or (colon and (not number.isdecimal() or int(number) < 1)):
        raise Refused(f"output {output!r}", where="attend", fits="topk:8, slab:16: a kind and how many")
    if kind not in OUTPUTS and kind not in COUNTED:
        raise Refused(f"output {output!r}", where="attend", fits=nearest(kind, (*OUTPUTS, *COUNTED)))
    return kind, int(number or 0)


FAINT = -1e4  # a kept key scored lower may weigh less than one that a model's fill takes away
IN_ORDER = name("j") <= name("i")  # a query sees no key that comes after it
CAUSAL = IN_ORDER.text
