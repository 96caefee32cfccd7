"""The text form of one `attend`: what is kept, how scores become weights, what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..symbol_text import parse
from ..symbols import TRUE, Expr, name
from .spec import Spec

NORMALISERS = ("softmax", "sum", "none", "stick")
OUTPUTS = ("o", "lse", "weights", "colsum", "colmean", "colmax", "entropy")


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
    q_positions: str = ""  # name of a table (N,) or (B, N)
    k_positions: str = ""  # name of a table (M,) or (B, M)
    more: tuple[tuple[str, str, str], ...] = ()  # further segments: keep, score, k_positions
    outputs: tuple[str, ...] = ("o",)

    @cached_property
    def keep_expr(self) -> Expr:
        return parse(self.keep) if self.keep else TRUE

    @cached_property
    def score_expr(self) -> Expr:
        return parse(self.score)

    @property
    def segments(self) -> tuple[tuple[str, str, str], ...]:
        """(keep, score, k_positions) of every segment."""
        return ((self.keep, self.score, self.k_positions), *self.more)

    @property
    def conjuncts(self) -> tuple[Expr, ...]:
        """The predicate as a list of conditions that must all hold."""
        e = self.keep_expr
        return e.args if e.op == "and" else (() if e.text == TRUE.text else (e,))

    @property
    def scale(self) -> float | None:
        """The factor on q.k where the score starts with one plain factor (before a softcap or a bias), else None."""
        for e in self.score_expr.walk():
            if e.op == "mul" and len(e.args) == 2 and e.args[0].text == "s" and e.args[1].op == "const":
                return float(e.args[1].args[0])
            if e.op in ("add", "tanh", "truediv") and any(isinstance(a, Expr) and a.text == "s" for a in e.args):
                return 1.0
        return 1.0 if self.score == "s" else None

    @property
    def is_causal(self) -> bool:
        return any(c.text == CAUSAL for c in self.conjuncts)


CAUSAL = (name("j") <= name("i")).text
