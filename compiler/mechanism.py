"""What a mechanism is: one frozen value that says its knobs, what it fits, its meaning and its exact limits.

The registry reads everything else from the class: recipe keys, command-line options, the docs table, the generic tests.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import announced
from .knob_types import Misfit, knob_type
from .refusal import Refused, nearest
from .site import FEATURES, Site
from .vocabulary import WORDS

PARTS = ("core", "gate", "cache", "region", "insert", "model")
KINDS = ("exact", "approximate", "needs recovery")


@dataclass(frozen=True)
class Param:
    """A learned tensor, or a buffer: its shape and how it starts."""

    shape: tuple[int, ...]
    init: Callable[[Tensor], Any] = torch.Tensor.zero_  # fills the tensor in place, drawing from torch's generator
    dtype: torch.dtype | None = None  # the site's own where None

    def started(self, like: Tensor) -> Tensor:
        """A new tensor of the site's own type and device, filled."""
        tensor = torch.empty(self.shape, dtype=self.dtype or like.dtype, device=like.device)
        self.init(tensor)
        return tensor


@dataclass(frozen=True)
class Limit:
    """A case whose answer is known exactly: what `got()` gives is within `atol` of what `expected()` gives."""

    says: str
    got: Callable[[], Tensor]
    expected: Callable[[], Tensor]
    atol: float = 1e-5


@dataclass(frozen=True)
class Aux:
    """What a forward gives besides its output: named losses, and new values of its buffers, written in train() only."""

    losses: Mapping[str, Tensor] = field(default_factory=dict)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)


class Tensors:
    """`p` in a forward: the mechanism's own tensors by attribute."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._values = dict(values)

    def __getattr__(self, wanted: str) -> Tensor:
        values: dict[str, Tensor] = object.__getattribute__(self, "_values")
        if wanted not in values:
            raise Refused(f"tensor {wanted!r}", where="p", fits=nearest(wanted, values))
        return values[wanted]

    def __contains__(self, wanted: str) -> bool:
        return wanted in self._values


class Mechanism:
    """Base of all mechanisms; subclasses are frozen dataclasses whose fields are the knobs.

    `forward(self, site, p, <ports by name>)` is the meaning. Ports: q, k, v (B, H, N, D); x, x_kv (B, N, C), the hidden
    state that fed the projections; o (B, H, N, D), the attention's output (gates); key_padding (B, M), true where a key
    is real; bias, positions, cos, sin, q_nope, k_nope. A parameter with a default is given only where the site has it;
    `train` in train() alone.
    """

    slug: ClassVar[str] = ""
    part: ClassVar[str] = "core"
    kind: ClassVar[str] = "needs recovery"
    stage: ClassVar[str] = ""  # of whole-model ones: weights, tokens, quantize or parallel; "": that of its recipe key
    honours: ClassVar[frozenset[str] | set[str]] = frozenset()
    paper: ClassVar[str] = ""
    tries: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)  # knobs that small generic questions are asked with
    stands: ClassVar[str] = ""  # an inserted one: "before" its block x is f(x), "behind" its attention x + f(LN(x))
    also: ClassVar[Mapping[str, str]] = {}  # a paper's word for a knob that is a word of this class: kind, part
    least: ClassVar[Mapping[str, float]] = {}  # the smallest values of knobs; of a knob called eps, or *_eps, it is 0
    judged: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)  # knobs that `quality --all` measures it at
    heads_alike: ClassVar[bool] = True  # permuting heads (with per-head tensors) permutes the answer
    taught: ClassVar[bool] = False  # its tensors choose, and learn by a loss of their own: none through the output
    heads_apart: ClassVar[bool] = True  # a head's answer does not depend on what stands in the other heads

    def fits(self, site: Site) -> str | None:
        """Why this mechanism cannot stand at a site (features and ports are checked elsewhere), or None."""
        return None

    def params(self, site: Site) -> Mapping[str, Param]:
        return {}

    def buffers(self, site: Site) -> Mapping[str, Param]:
        return {}

    def starts_from(self, site: Site, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Learned tensors that start from the site's own projections, {"q": (H, D, C), "k": (Hkv, D, C)}."""
        return {}

    def draws(self, site: Site) -> Mapping[str, Param]:
        """Random tensors of a forward; drawn in the graph, so that primitives stay pure."""
        return {}

    def limits(self) -> Iterable[Limit]:
        return ()

    def explains(self, site: Site) -> Iterable[str]:
        """What its knobs can be worth at a site, by counting alone; shown by `explain` and in the report."""
        return ()

    def key_heads(self, site: Site) -> int | None:
        """How many key heads are left where it is plain attention with W_k and W_v shrunk to them; None elsewhere."""
        return None

    def picked(self, groups: int, size: int) -> tuple[int, ...] | None:
        """Which of `size` joined key heads each group keeps; None: their mean."""
        return None

    def forward(self, site: Any, p: Any, *ports: Any, **named: Any) -> Any:  # a type that any list of ports fits
        raise Refused(f"{self.slug} has no forward", fits="define forward(self, site, p, q, k, v)")

    def apply(self, program: Any, paths: Any) -> None:
        """Whole-model mechanisms (part "model") change the program themselves, at an ordered list of sites."""
        raise Refused(f"{self.slug} is no whole-model pass", fits="define apply(self, program, paths)")

    @classmethod
    def knobs(cls) -> dict[str, tuple[Any, Any]]:
        """name -> (type text, default); MISSING where there is no default."""
        made = {f.name: f.default_factory() for f in fields(cls) if f.default_factory is not MISSING}  # type: ignore[arg-type]
        return {f.name: (f.type, made.get(f.name, f.default)) for f in fields(cls)}  # type: ignore[arg-type]

    @classmethod
    def asked_ports(cls) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Ports a forward must have, and those it takes where they exist."""
        return _asked(cls.forward)

    def wanted_ports(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self.asked_ports()

    @classmethod
    def summary(cls) -> str:
        """Its first line: of its file, where that holds this one mechanism, else of its class."""
        module = inspect.getmodule(cls)
        shared = module is None or sum(other.__module__ == module.__name__ for other in _REGISTRY.values()) != 1
        outside = shared or cls.__module__ == "__main__"
        text = (None if outside else inspect.getdoc(module)) or inspect.getdoc(cls) or cls.slug
        return text.split("\n", 1)[0].strip()

    def refuses(self, site: Site, dropped: frozenset[str] = frozenset()) -> str | None:
        """Why this mechanism is refused at a site: a port it lacks, a feature it does not honour, its own `fits`."""
        missing = [port for port in self.wanted_ports()[0] if port not in site.ports]
        if missing:
            return f"{self.slug} asks for port {', '.join(missing)}, which this site does not have"
        if self.part in ("core", "region"):
            strange = sorted(site.features - set(self.honours) - dropped - {"rope"})
            if strange:
                return f"{self.slug} does not honour {', '.join(strange)} (`drop: [{', '.join(strange)}]` permits it)"
        return self.fits(site)


ROOM = 1e18  # the largest size of a number that is a knob
_REGISTRY: dict[str, type[Mechanism]] = {}
_LISTENERS: list[Callable[[str], None]] = []


@lru_cache(maxsize=1024)
def _asked(forward: Callable[..., Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    found = [q for n, q in inspect.signature(forward).parameters.items() if n not in ("self", "site", "p")]
    named = [q for q in found if q.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)]
    must = tuple(q.name for q in named if q.default is inspect.Parameter.empty)
    return must, tuple(q.name for q in named if q.name not in must)


def register(slug: str) -> Callable[[type[Mechanism]], type[Mechanism]]:
    """Make a mechanism known under its paper's short name; a second definition in a notebook replaces the first."""
    if not isinstance(slug, str) or not re.fullmatch("[a-z0-9][a-z0-9_-]*", slug) or slug in WORDS:
        fits = "@register('short_name') above @dataclass(frozen=True): small letters, digits, _ and -"
        raise Refused(f"name {slug!r}", where="register", fits=fits)

    def enter(cls: type[Mechanism]) -> type[Mechanism]:
        if not issubclass(cls, Mechanism) or not is_dataclass(cls):
            found = f"{cls.__name__} is no {'dataclass' if issubclass(cls, Mechanism) else 'Mechanism'}"
            fits = "@register('name') above @dataclass(frozen=True) above class Name(Mechanism)"
            raise Refused(found, where=slug, fits=fits)
        if cls.part not in PARTS or cls.kind not in KINDS:
            raise Refused(f"part {cls.part!r}, kind {cls.kind!r}", where=slug, fits=f"parts {PARTS}, kinds {KINDS}")
        for feature in sorted(set(cls.honours) - set(FEATURES)):
            raise Refused(f"honours {feature!r}", where=slug, fits=nearest(feature, FEATURES, kind="features"))
        if list(inspect.signature(cls.forward).parameters)[:3] != ["self", "site", "p"]:
            found = f"forward{inspect.signature(cls.forward)}"
            raise Refused(found, where=slug, fits="forward(self, site, p, ...) and the ports it reads, as q, k, v")
        cls.slug = slug
        _REGISTRY[slug] = cls
        for tell in _LISTENERS:
            tell(slug)
        return cls

    return enter


def when_registered(tell: Callable[[str], None]) -> None:
    """Call back with the name of every mechanism: those there are, those that packages announce, those to come."""
    for slug in {**_REGISTRY, **announced.announced()}:
        tell(slug)
    _LISTENERS.append(tell)


def mechanisms() -> dict[str, type[Mechanism]]:
    """Every registered mechanism by slug, in order of name; those that packages announce are loaded."""
    for slug in announced.untried():
        _load(slug)
    return dict(sorted(_REGISTRY.items()))


def mechanism(slug: str, /, **knobs: Any) -> Mechanism:
    """The mechanism of a name with its knobs; unknown names and knobs are refused with the nearest ones."""
    if slug not in _REGISTRY and slug in announced.untried():
        _load(slug)
    if slug not in _REGISTRY:
        broken = announced.why_not(slug)
        raise Refused(
            f"mechanism {slug!r}", fits=f"its package fails: {broken}" if broken else nearest(slug, mechanisms())
        )
    cls = _REGISTRY[slug]
    knobs = {cls.also.get(knob, knob): value for knob, value in knobs.items()}
    for knob in knobs:
        if knob not in cls.knobs():
            raise Refused(f"knob {knob!r}", where=slug, fits=nearest(knob, cls.knobs(), kind="its knobs"))
        _check_kind(slug, knob, cls.knobs()[knob][0], knobs[knob])
        _check_range(cls, knob, knobs[knob])
    return cls(**knobs)


def _check_kind(slug: str, knob: str, annotation: Any, value: Any) -> None:
    """A plain value or a list is one that its knob's annotation admits; of others the mechanism itself speaks."""
    if value is None or isinstance(value, int | float | str | list | tuple):
        known = knob_type(annotation)
        try:
            known.admit(value)
        except Misfit:
            raise Refused(f"{knob}={value!r}", where=slug, fits=known.says) from None


def _check_range(cls: type[Mechanism], knob: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    least = cls.least.get(knob, 0 if knob == "eps" or knob.endswith("_eps") else -math.inf)
    if value < least:
        raise Refused(f"{knob}={value!r}", where=cls.slug, fits=f"{least} or more")
    if isinstance(value, float) and abs(value) > ROOM:
        raise Refused(
            f"{knob}={value!r}", where=cls.slug, fits=f"numbers up to {ROOM:.0e}, whose squares float32 holds"
        )


def _load(slug: str) -> None:
    """Import what a package announces; a class that is not registered yet gets the announced name."""

    def enter(found: Any) -> None:
        if isinstance(found, type) and issubclass(found, Mechanism) and not found.slug:
            register(slug)(found)

    announced.load(slug, _REGISTRY, enter)
