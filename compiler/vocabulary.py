"""The words a recipe may use: mechanisms with their part and knobs, given as a value: reading imports no pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field

from .refusal import Refused

STAGES = ("weights", "attention", "heads", "tokens", "insert", "kv", "quantize", "parallel", "lower")

# recipe key -> the parts whose mechanisms it takes, and the stage in which it happens
KEY_PARTS: Mapping[str, tuple[str, ...]] = {
    "attention": ("core", "region"),
    "heads": ("gate",),
    "insert": ("insert",),
    "kv": ("cache",),
    "passes": ("model",),
    "quantize": ("model",),
}
KEY_STAGE: Mapping[str, str] = {
    "attention": "attention",
    "heads": "heads",
    "insert": "insert",
    "kv": "kv",
    "passes": "tokens",  # unless the mechanism names its stage
    "quantize": "quantize",
    "target": "lower",
}
WORDS = ("keep", "split", "rest")  # of a recipe itself: no mechanism can have these names
SITE_KEYS = ("attention", "heads", "insert", "kv")


@dataclass(frozen=True)
class Knob:
    """One setting: its annotation (`int`, `"float | None"`, `"Literal['a', 'b']"`), default and meaning."""

    type: object
    default: object = field(default_factory=lambda: MISSING)  # dataclasses.MISSING: must be given
    doc: str = ""


@dataclass(frozen=True)
class MechanismFacts:
    """What a recipe needs to know of a mechanism: name, part (core, gate, cache, region, insert, model) and knobs.

    `stage` is for whole-model ones: weights, tokens, quantize or parallel; "" is the stage of its key.
    """

    name: str
    part: str
    knobs: Mapping[str, Knob] = field(default_factory=dict)
    stage: str = ""
    doc: str = ""
    make: Callable[..., object] | None = None  # refuses knobs that do not go together


@dataclass(frozen=True)
class Vocabulary:
    """All mechanisms by name."""

    mechanisms: Mapping[str, MechanismFacts]

    def __post_init__(self) -> None:
        for name, facts in self.mechanisms.items():
            if name in WORDS:
                raise Refused(f"mechanism {name!r}", fits="keep, split and rest are words of the recipe itself")
            if facts.stage and facts.stage not in STAGES:
                raise Refused(f"stage {facts.stage!r}", where=name, fits=", ".join(STAGES))

    def fitting(self, key: str) -> dict[str, MechanismFacts]:
        """The mechanisms that a recipe key takes: `attention` cores and regions, `kv` caches, `quantize` schemes ..."""
        return {
            name: facts
            for name, facts in sorted(self.mechanisms.items())
            if facts.part in KEY_PARTS[key] and (facts.stage == "quantize") == (key == "quantize")
        }

    def key_of(self, name: str) -> str:
        """The recipe key that takes a mechanism."""
        return next((key for key in KEY_PARTS if name in self.fitting(key)), "")

    def stage(self, key: str, name: str = "") -> str:
        """The stage in which a recipe key, or one mechanism under it, happens."""
        facts = self.mechanisms.get(name)
        return (facts.stage if facts else "") or KEY_STAGE[key]
