"""A site: the facts about one place where a model attends. Frozen, hashable, printable, JSON; no tensors, no graph."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from .showing.markup import el

PATTERNS = ("causal-self", "noncausal-self", "causal-cross", "noncausal-cross")
FEATURES = ("bias", "softcap", "sinks", "padding", "dropout", "packed", "rope", "window", "mask")


@dataclass(frozen=True)
class Grid:
    """Tokens on a grid: `prefix` tokens (class, registers) first, then h rows of w."""

    h: int
    w: int
    prefix: int = 0


@dataclass(frozen=True)
class Site:
    """One attention, as the graph shows it.

    >>> print(Site("layers.3.self_attn", 3, heads=8, kv_heads=2, dim=64, v_dim=64, scale=0.125, pattern="causal-self"))
    layers.3.self_attn: attention[causal-self h=8 kv=2 d=64]
    """

    path: str  # module path; "#k" for the k-th attention in (or call of) one module
    index: int  # order in the graph
    heads: int
    kv_heads: int
    dim: int
    v_dim: int
    scale: float
    pattern: str
    mask: str = ""  # canonical predicate over (b, h, i, j); "" keeps everything
    features: frozenset[str] = frozenset()
    grid: Grid | None = None
    weights: tuple[tuple[str, str], ...] = ()  # ("q", "...q_proj.weight"), ...; one name for several roles where fused
    ports: tuple[str, ...] = ("q", "k", "v")
    queries: str = ""  # N and M as the graph knows them: "197" or "s1"
    keys: str = ""
    window: int | None = None
    pairs: str = ""  # channels that rotary positions turn together: "halves", "neighbours"; "" where it is not known
    width: int = 0  # C of the hidden state x that feeds the projections; 0 where it is not known

    @property
    def causal(self) -> bool:
        return self.pattern.startswith("causal")

    @property
    def self_attention(self) -> bool:
        return self.pattern.endswith("self")

    def __str__(self) -> str:
        kv = f" kv={self.kv_heads}" if self.kv_heads != self.heads else ""
        dv = f" dv={self.v_dim}" if self.v_dim != self.dim else ""
        window = f" window={self.window}" if self.window else ""
        told = self.features - {"window"} if window else self.features
        extra = f" {'+'.join(sorted(told))}" if told else ""
        return f"{self.path}: attention[{self.pattern} h={self.heads}{kv} d={self.dim}{dv}{window}{extra}]"

    def said(self) -> tuple[tuple[str, str], ...]:
        """What there is to tell, by name, for a reader."""
        found = (
            ("pattern", self.pattern),
            ("heads", f"{self.heads}" + (f", {self.kv_heads} of keys" if self.kv_heads != self.heads else "")),
            ("shapes", f"q (B, {self.heads}, {self.queries or 'N'}, {self.dim}) · "
                       f"k (B, {self.kv_heads}, {self.keys or 'M'}, {self.dim}) · "
                       f"v (B, {self.kv_heads}, {self.keys or 'M'}, {self.v_dim})"),
            ("scale", f"{self.scale:.6g}"),
            ("features", ", ".join(sorted(self.features))),
            ("grid", f"{self.grid.h} x {self.grid.w}, {self.grid.prefix} before" if self.grid else ""),
            ("weights", ", ".join(f"{role} = {name}" for role, name in self.weights)),
            ("ports", ", ".join(self.ports)),
        )  # fmt: skip
        return tuple((name, value) for name, value in found if value)

    def _repr_html_(self) -> str:
        rows = [el("tr", el("th", name, style="text-align:left"), el("td", value)) for name, value in self.said()]
        return el("table", el("caption", str(self)), *rows)

    def to_json(self) -> str:
        facts = asdict(self) | {"features": sorted(self.features), "weights": [list(w) for w in self.weights]}
        return json.dumps(facts, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Site:
        facts: dict[str, Any] = json.loads(text)
        facts["features"] = frozenset(facts["features"])
        facts["weights"] = tuple((role, weight) for role, weight in facts["weights"])
        facts["ports"] = tuple(facts["ports"])
        facts["grid"] = Grid(**facts["grid"]) if facts["grid"] else None
        return Site(**facts)
