"""Where a site stands among the others: its layer, its stage and its index, read from the paths.

The layer is the number in the path (`model.layers.3.self_attn`: 3), counted per stack (`encoder.layers` and
`decoder.layers` each have a last one). A path with several numbers (swin: layers.1.blocks.0.attn) has its first one as
stage, and as layer the running number of its block in graph order. A last number that only tells unlike modules of one
list apart does not count (T5: block.0.layer.0.SelfAttention and block.0.layer.1.EncDecAttention are both layer 0). A
path without a number has no layer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class SiteLike(Protocol):
    """What matching needs of a site."""

    @property
    def path(self) -> str: ...
    @property
    def index(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def dim(self) -> int: ...
    @property
    def pattern(self) -> str: ...
    @property
    def features(self) -> frozenset[str]: ...


@dataclass(frozen=True)
class Position:
    """Number and count of each: layer 3 of 32. None where the path has no such number."""

    layer: int | None
    layers: int
    stage: int | None
    stages: int
    index: int
    sites: int

    def of(self, key: str) -> tuple[int | None, int]:
        """The number that a selector's key means, and how many there are."""
        return {
            "layer": (self.layer, self.layers),
            "stage": (self.stage, self.stages),
            "index": (self.index, self.sites),
        }[key]


@dataclass(frozen=True)
class _Block:
    """A path cut at its numbers: `stack` is what stands before the first, `numbers` those that count."""

    stack: str
    name: str  # the path up to its last counting number
    numbers: tuple[int, ...]


def positions(sites: Sequence[SiteLike]) -> list[Position]:
    """The position of each site, in the order given.

    >>> from types import SimpleNamespace as S
    >>> paths = ["layers.0.blocks.0.attn", "layers.0.blocks.1.attn", "layers.1.blocks.0.attn"]
    >>> [(at.layer, at.stage) for at in positions([S(path=path, index=n) for n, path in enumerate(paths)])]
    [(0, 0), (1, 0), (2, 1)]
    """
    blocks = _blocks([site.path.partition("#")[0] for site in sites])
    running = {name: n for n, name in enumerate(dict.fromkeys(b.name for b in blocks if len(b.numbers) > 1))}
    layer = [running[b.name] if len(b.numbers) > 1 else b.numbers[0] if b.numbers else None for b in blocks]
    stage = [b.numbers[0] if len(b.numbers) > 1 else None for b in blocks]
    # running numbers go through the whole model, others through their stack
    layers = _counts(["" if len(b.numbers) > 1 else b.stack for b in blocks], layer)
    stages = _counts([b.stack for b in blocks], stage)
    return [Position(layer[n], layers[n], stage[n], stages[n], site.index, len(sites)) for n, site in enumerate(sites)]


def _counts(groups: Sequence[str], numbers: Sequence[int | None]) -> list[int]:
    """For each entry, how many numbers its group counts: the largest and one."""
    most: dict[str, int] = {}
    for group, number in zip(groups, numbers):
        most[group] = max(most.get(group, 0), 0 if number is None else number + 1)
    return [most[group] for group in groups]


def _blocks(paths: Sequence[str]) -> list[_Block]:
    """Each path's block; the last of several numbers is left out where its list holds unlike modules."""
    tails: dict[str, dict[str, set[str]]] = {}  # list -> number -> what follows
    for path in paths:
        found = _cut(path)
        if found:
            tails.setdefault(found[0], {}).setdefault(found[1], set()).add(found[2])
    return [_block(path, tails) for path in paths]


def _block(path: str, tails: dict[str, dict[str, set[str]]]) -> _Block:
    name, found = path, _cut(path)
    if found and re.search(r"(^|\.)\d+(\.|$)", found[0]):
        siblings = list(tails[found[0]].values())
        if len(siblings) > 1 and not set.intersection(*siblings):
            name = found[0]
    numbered = _cut(name)
    if not numbered:
        return _Block("", path, ())
    numbers = tuple(int(segment) for segment in name.split(".") if segment.isdecimal())
    return _Block(re.split(r"(?:^|\.)\d+(?:\.|$)", name)[0], ".".join(numbered[:2]).lstrip("."), numbers)


def _cut(path: str) -> tuple[str, str, str] | None:
    """A path at its last number: what stands before, the number, what follows."""
    segments = path.split(".")
    last = next((n for n in reversed(range(len(segments))) if segments[n].isdecimal()), None)
    return None if last is None else (".".join(segments[:last]), segments[last], ".".join(segments[last + 1 :]))
