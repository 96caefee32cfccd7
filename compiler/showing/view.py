"""What there is to see of one model, as plain values: every writer reads these and nothing else."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..primitives.operator import Footprint

CHANGED, KEPT, REFUSED = "rewritten", "kept", "refused"


@dataclass(frozen=True)
class Pair:
    """One quantity before and after; predicted, unless its column says otherwise."""

    before: float
    after: float


@dataclass(frozen=True)
class Mask:
    """A predicate over positions drawn in tiles: a letter a tile, e(mpty), p(artial), f(ull), one text a row."""

    says: str
    latex: str
    tile: int
    rows: tuple[str, ...]
    share: str = ""


@dataclass(frozen=True)
class Kernel:
    """What runs a computation on a target, as source."""

    name: str
    device: str
    source: str
    footprints: tuple[Footprint, ...] = ()


@dataclass(frozen=True)
class Computation:
    """One attention as equations; sites that compute the same share it."""

    key: str
    spec: str
    formulas: tuple[tuple[str, str], ...] = ()  # what it is, LaTeX
    masks: tuple[Mask, ...] = ()
    cascade: str = ""
    kernels: tuple[Kernel, ...] = ()


@dataclass(frozen=True)
class Layer:
    """One site: a row of the table, and its card."""

    path: str
    status: str
    mechanism: str = ""  # as the recipe would say it
    slug: str = ""  # decides the colour
    kind: str = ""
    reason: str = ""
    deviation: float | None = None
    says: str = ""  # the deviation in full
    work: Pair | None = None  # FLOPs
    moved: Pair | None = None  # bytes
    time: Pair | None = None  # seconds on `View.device`, a roofline
    kv: Pair | None = None  # bytes of its cache after the example call
    rule: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    before: str = ""  # key of a computation
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Operation:
    """One line of the graph: what stood there, what stands there; equal where nothing changed, "" where nothing is."""

    before: str
    after: str
    shape: str = ""
    mechanism: str = ""

    @property
    def mark(self) -> str:
        if self.before == self.after:
            return "same"
        return "gone" if not self.after else "new" if not self.before else "changed"


@dataclass(frozen=True)
class Module:
    """The operations of one module in order, and the modules inside it."""

    path: str
    kind: str
    operations: tuple[Operation, ...] = ()
    inside: tuple[Module, ...] = ()

    @property
    def changed(self) -> int:
        return sum(o.mark != "same" for o in self.operations) + sum(m.changed for m in self.inside)

    @property
    def count(self) -> int:
        return len(self.operations) + sum(m.count for m in self.inside)


@dataclass(frozen=True)
class Rule:
    """A rule of the recipe and the sites that it decided."""

    text: str
    where: str
    sites: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measure:
    """One number of every head: a row a site."""

    name: str
    sites: tuple[str, ...]
    rows: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class View:
    """A model before a rewrite, or before and after one."""

    title: str
    verdict: str
    recipe: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    layers: tuple[Layer, ...] = ()
    next: tuple[str, ...] = ()  # what to do now
    lists: tuple[tuple[str, tuple[str, ...]], ...] = ()  # warnings, passes, near misses, notes
    computations: tuple[Computation, ...] = ()
    graph: tuple[Module, ...] = ()
    rules: tuple[Rule, ...] = ()
    heads: tuple[Measure, ...] = ()
    plot: str = ""  # quality against cost, a picture made by this package
    device: str = ""  # what predicted times are for

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def _repr_html_(self) -> str:
        """In a notebook the page."""
        from .page import part  # which reads views

        return part(self)

    @property
    def slugs(self) -> tuple[str, ...]:
        """The mechanisms in order of their first site: the order of their colours."""
        return tuple(dict.fromkeys(layer.slug for layer in self.layers if layer.slug))
