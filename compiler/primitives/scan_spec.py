"""The text form of one `scan`: how the state decays, what is read from it, what comes out."""

from __future__ import annotations

from dataclasses import dataclass

from .spec import Spec

NORMALISERS = ("none", "sum")
OUTPUTS = ("o", "state", "norm")
READS = ("after", "before")


@dataclass(frozen=True)
class ScanSpec(Spec):
    """Names of tables (t0, t1, ...) are empty where there is none; features are expressions in x."""

    causal: bool = True
    feature_q: str = ""
    feature_k: str = ""
    decay: str = ""  # table (B|1, H|1, N|1, D|1)
    log_decay: bool = False  # the table holds logarithms of the factors
    normaliser: str = "none"
    eps: float = 0.0
    documents: str = ""  # table (1|B, N) of ids; the state starts anew where they change
    valid: str = ""  # table (1|B, M); a row that is not valid leaves the state as it is
    state: str = ""  # table (B, H, D, Dv), one more column under "sum"
    read: str = "after"
    outputs: tuple[str, ...] = ("o",)
