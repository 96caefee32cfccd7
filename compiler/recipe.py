"""What a recipe asks for, as values: rules over sites, whole-model passes, bounds; equal however it was written.

Reading one is `recipe_load.py`, matching it with sites `decisions.py`; here is only what it is and how it prints.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

from .knob_types import Table, thaw
from .path_glob import glob
from .recipe_yaml import resolve
from .refusal import Refused
from .selectors import Selector
from .showing.markup import el

VERSIONS = (1,)
TARGETS = ("auto", "eager", "cpu", "triton")


@dataclass(frozen=True)
class Keep:
    """Leave it as it is; a decision like any other: later rules no longer ask."""

    def plain(self) -> str:
        return "keep"

    def __str__(self) -> str:
        return "keep"


KEEP = Keep()


@dataclass(frozen=True)
class Choice:
    """A mechanism and the knobs that were given, in order of name, frozen.

    >>> print(Choice("window", (("sinks", 4), ("window", 64))))
    window(sinks=4, window=64)
    """

    mechanism: str
    knobs: tuple[tuple[str, Any], ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """The knobs as keyword arguments; lists are tuples, as dataclass fields hold them."""
        return {name: _argument(value) for name, value in self.knobs}

    def plain(self) -> Any:
        return {self.mechanism: {name: thaw(value) for name, value in self.knobs}} if self.knobs else self.mechanism

    def __str__(self) -> str:
        said = ", ".join(f"{name}={thaw(value)}" for name, value in self.knobs)
        return f"{self.mechanism}({said})" if said else self.mechanism


@dataclass(frozen=True)
class Split:
    """A core per group of heads; heads are written as "0-3" or "0,2", the last one may be "rest"."""

    parts: tuple[tuple[str, Choice | Keep], ...]

    def plain(self) -> Any:
        return {"split": {heads: choice.plain() for heads, choice in self.parts}}

    def over(self, heads: int, kv_heads: int) -> tuple[tuple[tuple[int, ...], Choice | Keep], ...]:
        """The head numbers of each part at a site; refused unless all heads are covered once, by whole kv groups."""
        taken: set[int] = set()
        found = []
        for text, choice in self.parts:
            mine = set(range(heads)) - taken if text == "rest" else head_numbers(text)
            if not mine or max(mine) >= heads or mine & taken:
                raise Refused(f"split {text!r} of {heads} heads", fits=f"each of heads 0..{heads - 1} in one part")
            taken |= mine
            found.append((tuple(sorted(mine)), choice))
        if len(taken) < heads:
            left = sorted(set(range(heads)) - taken)
            raise Refused(f"split leaves out heads {left} of {heads}", fits="add `rest: keep`")
        _whole_groups([mine for mine, _ in found], heads, kv_heads)
        return tuple(found)

    def __str__(self) -> str:
        return "split(" + ", ".join(f"{heads}: {choice}" for heads, choice in self.parts) + ")"


Wish: TypeAlias = Choice | Keep | Split


@dataclass(frozen=True)
class Rule:
    """At the sites that match: one wish per key, and the features that its mechanisms may drop."""

    match: Selector
    decides: tuple[tuple[str, Wish], ...]  # key (attention, heads, insert, kv) in that order
    drop: frozenset[str] = frozenset()
    where: str = field(default="", compare=False)

    def plain(self) -> dict[str, Any]:
        drop = {"drop": sorted(self.drop)} if self.drop else {}
        return {"match": self.match.plain(), **{key: wish.plain() for key, wish in self.decides}, **drop}


@dataclass(frozen=True)
class Data:
    """What quality is judged and calibrated on; files are looked for beside the recipe."""

    calibrate: str | None = field(default=None, metadata={"doc": "what statistics are taken on"})
    verify: str | None = field(default=None, metadata={"doc": "held-out data that bounds are checked on"})
    length: int | None = field(default=None, metadata={"doc": "tokens a sample", "least": 1})
    samples: int | None = field(default=None, metadata={"doc": "how many samples", "least": 1})
    seed: int | None = field(default=None, metadata={"doc": "which samples, where there are more", "least": 0})


@dataclass(frozen=True)
class Verify:
    """Bounds on what a rewrite may change at the output, and what happens beyond them."""

    max_error: float | None = field(default=None, metadata={"doc": "largest relative error", "least": 0})
    min_cosine: float | None = field(default=None, metadata={"doc": "smallest cosine", "least": -1, "most": 1})
    max_kl: float | None = field(default=None, metadata={"doc": "KL divergence in nats (needs data)", "least": 0})
    min_top1: float | None = field(
        default=None, metadata={"doc": "share of equal first choices (needs data)", "least": 0, "most": 1}
    )
    otherwise: str = field(
        default="rollback",
        metadata={"key": "else", "type": "Literal['rollback', 'refuse', 'warn']", "doc": "when a bound does not hold"},
    )

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds that were given."""
        named = ("max_error", "min_cosine", "max_kl", "min_top1")
        return {name: getattr(self, name) for name in named if getattr(self, name) is not None}

    @property
    def needs_data(self) -> tuple[str, ...]:
        """The bounds that mean nothing on random inputs."""
        return tuple(name for name in self.bounds if name in ("max_kl", "min_top1"))


@dataclass(frozen=True)
class Recover:
    """Training after the rewrite: what may move, and for how long."""

    train: str = field(
        default="new",
        metadata={
            "type": "Literal['new', 'lora', 'sites', 'all']",
            "doc": "new tensors; also low-rank deltas of the linears around sites, these linears whole, or all",
        },
    )
    steps: int = field(default=1000, metadata={"doc": "optimizer steps", "least": 1})
    lr: float = field(default=1e-3, metadata={"doc": "learning rate", "least": 0})
    rank: int | None = field(default=None, metadata={"doc": "of low-rank deltas", "least": 1})
    batch: int | None = field(default=None, metadata={"doc": "samples a step", "least": 1})
    seed: int | None = field(default=None, metadata={"doc": "of the order of samples", "least": 0})


@dataclass(frozen=True)
class Recipe:
    """Everything that is asked of a model. Equal recipes have equal text and digest, whatever they were read from."""

    version: int = VERSIONS[-1]
    model: tuple[tuple[str, Any], ...] = ()  # the guard, in order of name
    data: Data = Data()
    rules: tuple[Rule, ...] = ()  # written as `sites`
    passes: tuple[Choice, ...] = ()
    quantize: tuple[tuple[str, Choice | Keep], ...] = ()
    verify: Verify = Verify()
    recover: Recover | None = None
    target: str = "auto"
    source: str = field(default="", compare=False)  # the file or name it came from

    @property
    def empty(self) -> bool:
        return not (self.rules or self.passes or self.quantize)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text().encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain data that loads as an equal recipe; only what differs from a recipe that asks nothing."""
        found: dict[str, Any] = {"version": self.version}
        found |= {"model": {name: thaw(value) for name, value in self.model}} if self.model else {}
        found |= {"data": given(self.data)} if given(self.data) else {}
        found |= {"sites": [rule.plain() for rule in self.rules]} if self.rules else {}
        found |= {"passes": [choice.plain() for choice in self.passes]} if self.passes else {}
        found |= {"quantize": {path: choice.plain() for path, choice in self.quantize}} if self.quantize else {}
        found |= {"verify": given(self.verify)} if given(self.verify) else {}
        found |= {"recover": given(self.recover)} if self.recover else {}
        return found | ({"target": self.target} if self.target != "auto" else {})

    def text(self) -> str:
        """Canonical YAML: one key a line, rules and passes as lists, values in one line each."""
        lines = []
        for key, value in self.to_dict().items():
            lines += [f"{key}:", *_block(value)] if isinstance(value, list) else [f"{key}: {flow(value)}"]
        return "\n".join(lines) + "\n"

    def _repr_html_(self) -> str:
        return el("pre", self.text())

    def quantized(self, path: str) -> Choice | Keep | None:
        """What the module at a path becomes: the first pattern that matches, or None."""
        return next((choice for pattern, choice in self.quantize if glob(pattern).matches(path)), None)

    def __str__(self) -> str:
        return self.text()


FACTS = ("class", "heads", "layers", "type", "width")  # that a guard can ask for


def guard(recipe: Recipe, facts: Mapping[str, Any]) -> None:
    """Refuses a model that the recipe was not made for, before any work; a list in the guard means any of it."""
    for name, wanted in recipe.model:
        if name not in facts:
            known = ", ".join(sorted(facts)) or "nothing"
            raise Refused(f"model.{name}: {thaw(wanted)!r}", where=recipe.source, fits=f"known of this model: {known}")
        if facts[name] not in (wanted if isinstance(wanted, tuple) else (wanted,)):
            found = f"made for {name} {thaw(wanted)!r}, this model has {facts[name]!r}"
            raise Refused(found, where=recipe.source, fits="leave the `model` guard away if it is meant")


def given(section: Any) -> dict[str, Any]:
    """A section's fields that differ from their defaults, by recipe key."""
    return {
        f.metadata.get("key", f.name): getattr(section, f.name)
        for f in fields(section)
        if getattr(section, f.name) != f.default
    }


def head_numbers(text: str) -> set[int]:
    """The heads that "0-3" or "0,2,4-5" means; refused where that is no such text."""
    found: set[int] = set()
    for part in text.split(","):
        span = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part)
        if not span or int(span[1]) > int(span[2] or span[1]):
            raise Refused(f"heads {text!r}", fits='expected "0-3", "0,2,4-5" or rest')
        found.update(range(int(span[1]), int(span[2] or span[1]) + 1))
    return found


def flow(value: Any) -> str:
    """One value as YAML on one line.

    >>> flow({"layer": "0-1", "lr": 1e-3, "on": ["1e-3", True, None]})
    '{layer: 0-1, lr: 0.001, on: ["1e-3", true, null]}'
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{flow(key)}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z0-9_][\w.\-/]*", value, re.ASCII) and resolve(value) == value
        return value if plain else json.dumps(value)
    if isinstance(value, float) and math.isinf(value):
        return ".inf" if value > 0 else "-.inf"
    return json.dumps(value)


def _block(items: list[Any]) -> list[str]:
    lines = []
    for item in items:
        pairs = (
            [f"{flow(key)}: {flow(value)}" for key, value in item.items()] if isinstance(item, dict) else [flow(item)]
        )
        lines += [f"  - {pairs[0]}", *(f"    {pair}" for pair in pairs[1:])]
    return lines


def _whole_groups(parts: list[tuple[int, ...]], heads: int, kv_heads: int) -> None:
    group = heads // kv_heads
    for mine in parts:
        if any((head // group * group + other) not in mine for head in mine for other in range(group)):
            found = f"split takes heads {list(mine)} of {heads} with {kv_heads} kv heads"
            raise Refused(found, fits=f"whole groups of {group} that share a kv head: 0-{group - 1}, ...")


def _argument(value: Any) -> Any:
    """As a dataclass field holds it: lists stay tuples, tables become mappings."""
    if isinstance(value, Table):
        return {key: _argument(item) for key, item in value.items}
    return tuple(map(_argument, value)) if isinstance(value, tuple) else value
