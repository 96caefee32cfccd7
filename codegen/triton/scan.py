"""`scan` as Triton: the source of one spec. Its gradient is three more scans, so that operands are named by their part.

With r the rows before they are divided, g their gradients and S' the gradient of the state behind a row,

    dq = scan(g, v, k)    forwards from S^T          dk = scan(v, g, q)    backwards from S'^T
    dv = scan(k, q, g)    backwards from S'

under the same decays between two rows (a decay of each channel of a key is one of a value's in the first two, and what
it gathers are q dq and k dk); a normaliser is one more column of v and of g. The features of an operand are
printed where it is read, and their slopes where a gradient is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from ...compiler.primitives.scan_spec import ScanSpec
from ...compiler.refusal import Refused
from ...compiler.symbol_slope import slope
from ...compiler.symbol_text import parse
from ...compiler.symbols import Expr
from .attend import listed, refusal
from .printer import triton_text
from .skeleton import filled, text_of


@dataclass(frozen=True)
class Scan:
    """What a kernel is made of; expressions are in x, empty where there is none."""

    of_rows: str = ""
    of_keys: str = ""
    of_values: str = ""
    slope_of: str = ""  # the feature whose slope at X a result is multiplied with
    causal: bool = True
    backwards: bool = False  # from the last row on
    before: bool = False
    decay: str = ""  # of "rows", of the "channels" of a key, or of those of a "value"
    logs: bool = False
    sum: bool = False
    eps: float = 0.0
    documents: bool = False
    valid: str = ""  # what rows that do not count are left out of: "", "keys", "rows"
    start: bool = False
    outputs: tuple[str, ...] = ("o",)

    @cached_property
    def source(self) -> str:
        """The whole module."""
        said = {what: _printed(getattr(self, what)) for what in ("of_rows", "of_keys", "of_values")}
        said |= {"valid": "valid, VALID_n, " if self.valid else "", "arguments": listed(self.arguments)}
        said["slope"] = triton_text(slope(_parsed(self.slope_of), "x"), "f") if self.slope_of else "1.0"
        inner = {name: filled(f"scan_{name}", self.flags, said).splitlines() for name in ("begin", "store", "end")}
        skeleton = "scan_chunks" if self.causal else "scan_both_ways"
        texts = [text_of("functions"), filled("scan_parts", self.flags, said)]
        return "".join([*texts, filled(skeleton, self.flags, {**said, **inner})])

    @cached_property
    def flags(self) -> dict[str, bool]:
        return {
            "BACKWARDS": self.backwards,
            "BEFORE": self.before,
            "BY_ROW": self.decay == "rows",
            "BY_VALUE": self.decay == "value",
            "CARRIES": bool(self.decay) or self.documents,
            "CHANNELS": self.decay == "channels",
            "DECAYS": bool(self.decay),
            "DOCUMENTS": self.documents,
            "LOGS": self.logs,
            "NORM": "norm" in self.outputs,
            "SLOPED": bool(self.slope_of),
            "START": self.start,
            "STATE": "state" in self.outputs,
            "SUM": self.sum,
            "VALID": bool(self.valid),
            "VALID_KEYS": self.valid == "keys",
            "VALID_ROWS": self.valid == "rows",
            "VALUES": "o" in self.outputs,
        }

    @property
    def arguments(self) -> list[str]:
        found = [f"{port}{step}" for port in self.ports for step in ("", "_b", "_h", "_n", "_d", "_group")]
        found += [f"A{step}" for step in ("", "_b", "_h", "_n", "_d")] if self.decay else []
        found += [f"START{step}" for step in ("", "_b", "_h", "_n", "_d")] if self.start else []
        found += ["VALID", "VALID_b", "VALID_n"] if self.valid else []
        found += ["DOCUMENT", "DOCUMENT_b", "DOCUMENT_n"] if self.documents else []
        found += ["EPS"] if self.sum else []
        made = [name for name, output in (("O", "o"), ("STATE", "state"), ("NORM", "norm")) if output in self.outputs]
        return [*found, *made, *(["COLUMNS"] if "STATE" in made else [])]

    @property
    def ports(self) -> str:
        return "QKVX" if self.slope_of else "QKV"


def of_spec(spec: ScanSpec, channels: bool) -> Scan:
    """The kernel of a call."""
    return Scan(
        of_rows=spec.feature_q,
        of_keys=spec.feature_k,
        causal=spec.causal,
        before=spec.read == "before",
        decay="" if not spec.decay else "channels" if channels else "rows",
        logs=spec.log_decay,
        sum=spec.normaliser == "sum",
        eps=spec.eps,
        documents=bool(spec.documents),
        valid="keys" if spec.valid else "",
        start=bool(spec.state),
        outputs=tuple(which for which in spec.outputs if which != "norm" or spec.normaliser == "sum"),
    )


def _parsed(feature: str) -> Expr:
    found = parse(feature)
    if found.names - {"x"} or any(e.op == "lookup" for e in found.walk()):
        raise Refused(f"a feature of {', '.join(sorted(found.names))}", where="scan", fits="an expression in x")
    return found


def _printed(feature: str) -> str:
    return triton_text(_parsed(feature), "f") if feature else "x"


@lru_cache(maxsize=1024)
def why_not(text: str) -> str | None:
    """Why the skeletons cannot say a spec, whatever the tensors; None where they can."""
    spec = ScanSpec.of(text)
    if not spec.causal and spec.documents:
        return "documents whose rows read what comes after them"
    return refusal(lambda: of_spec(spec, False).source)
