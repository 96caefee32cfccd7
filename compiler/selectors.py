"""Which sites a rule means: a path glob, or conditions on layer, kind, heads, dims and features; all must hold.

A condition is kept as canonical text, so that selectors are values that hash, compare and print as they are written.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

from .path_glob import glob
from .positions import Position, SiteLike
from .refusal import Refused, nearest
from .site import FEATURES, PATTERNS

Condition: TypeAlias = tuple[str, tuple[str, ...]]

KEYS: Mapping[str, str] = {
    "path": 'a glob: "model.layers.{2..31}.*", "**.attn"; a list takes any of several',
    "part": 'whole segments that stand in the path: "decoder", "vision_tower"',
    "layer": '"0-1", "0,3,5-7", "-1" (the last), "even", "odd"',
    "stage": "the same for the first number of a path that has several (swin: layers.STAGE.blocks.0)",
    "index": "the same for the site's place in the graph",
    "kind": "causal-self, noncausal-self, causal-cross, noncausal-cross, or half of it: causal, self ...",
    "heads": '8, "8,16", "4-16" or ">=8 <64"',
    "kv_heads": "the same",
    "dim": "the same, of one head",
    "has": "features that must be there: " + ", ".join(FEATURES),
    "without": "features that must not be there",
}

_SPAN = re.compile(r"(-?\d{1,6})(?:(?:-|\.\.)(-?\d{1,6}))?")
_COMPARE = re.compile(r"(>=|<=|==|!=|>|<)\s*(\d{1,9})\s*")
_OPERATORS: Mapping[str, Callable[[int, int], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_PLACES, _NUMBERS, _SETS = ("layer", "stage", "index"), ("heads", "kv_heads", "dim"), ("has", "without")


@dataclass(frozen=True)
class Selector:
    """Conditions that must all hold; none means every site.

    >>> print(selector({"layer": "2-31", "kind": "causal-self"}))
    {kind: causal-self, layer: 2-31}
    """

    conditions: tuple[Condition, ...] = ()

    def matches(self, site: SiteLike, position: Position) -> bool:
        return self.misses(site, position) is None

    def misses(self, site: SiteLike, position: Position) -> Condition | None:
        """The first condition that does not hold at a site."""
        return next((one for one in self.conditions if not _holds(one, site, position)), None)

    def plain(self) -> Any:
        """As it is written in a recipe: "*", a path, or a mapping."""
        if not self.conditions:
            return "*"
        table = {key: values[0] if len(values) == 1 else list(values) for key, values in self.conditions}
        return table["path"] if list(table) == ["path"] and isinstance(table["path"], str) else table

    def __str__(self) -> str:
        plain = self.plain()
        return plain if isinstance(plain, str) else "{" + ", ".join(f"{k}: {_shown(v)}" for k, v in plain.items()) + "}"


def selector(written: str | Mapping[str, Any]) -> Selector:
    """The selector of a text (a path glob) or a mapping of conditions; what is not understood is refused by key."""
    if isinstance(written, str):
        return selector({"path": written})
    conditions = {key: condition(key, value) for key, value in written.items()}
    # "*" says nothing: with it or without, the selector is the same
    return Selector(tuple((key, conditions[key]) for key in sorted(conditions) if conditions[key] != ("*",)))


def condition(key: str, value: Any) -> tuple[str, ...]:
    """The canonical texts of one condition."""
    if key not in KEYS:
        raise Refused(f"key {key!r}", fits=nearest(key, KEYS, kind="a match takes"))
    values = value if isinstance(value, list | tuple) else [value]
    if not values or any(isinstance(one, bool) or not isinstance(one, str | int) for one in values):
        raise Refused(f"{key}: {value!r}", fits=f"expected {KEYS[key]}")
    texts = [str(one).strip() for one in values]
    if key in _PLACES:
        return (_spans_text(key, texts),)
    if key in _NUMBERS:
        return (",".join(part for text in texts for part in _number_parts(key, text)),)
    if key in _SETS or key == "kind":
        return tuple(sorted({_known(key, text) for text in texts}))
    for text in texts:
        _check_path(key, text)
    return ("*",) if key == "path" and "*" in texts else tuple(dict.fromkeys(texts))


def _holds(one: Condition, site: SiteLike, position: Position) -> bool:
    key, values = one
    if key == "path":
        called = site.path.partition("#")[0]  # a pattern without #k means every call of the module
        return any(glob(value).matches(site.path) or glob(value).matches(called) for value in values)
    if key == "part":
        return any(f".{value}." in f".{site.path.partition('#')[0]}." for value in values)
    if key in _PLACES:
        number, count = position.of(key)
        return number is not None and number in _members(values[0], count)
    if key in _NUMBERS:
        return any(_compares(part, getattr(site, key)) for part in values[0].split(","))
    if key == "kind":
        return any(value == site.pattern or value in site.pattern.split("-") for value in values)
    there = site.features.intersection(values)
    return len(there) == len(values) if key == "has" else not there


def _spans_text(key: str, texts: Sequence[str]) -> str:
    parts = [part.strip() for text in texts for part in text.split(",")]
    found = []
    for part in parts:
        span = _SPAN.fullmatch(part)
        if part not in ("even", "odd") and (not span or not _in_order(span)):
            raise Refused(f"{key}: {part!r}", fits=f"expected {KEYS['layer']}")
        first, last = span.groups() if span else (part, None)
        found.append(first if last is None else f"{first}-{last}")
    return ",".join(found)


def _in_order(span: re.Match[str]) -> bool:
    first, last = int(span[1]), int(span[2] or span[1])
    if (first < 0) == (last < 0):
        return first <= last
    return last < 0  # 2--1 is from the third to the last; -1-3 is nothing


@lru_cache(maxsize=4096)
def _members(text: str, count: int) -> frozenset[int]:
    """The numbers that "0,3,5-7,-1,even" means among 0 .. count-1."""
    found: set[int] = set()
    for part in text.split(","):
        span = _SPAN.fullmatch(part)
        if not span:
            found.update(range(part == "odd", count, 2))
            continue
        first, last = (int(end) + (count if end.startswith("-") else 0) for end in (span[1], span[2] or span[1]))
        found.update(range(max(first, 0), min(last, count - 1) + 1))
    return frozenset(found)


def _number_parts(key: str, text: str) -> Iterable[str]:
    if re.match("[<>=!]", text):
        compared = _COMPARE.findall(text)
        if "".join(f"{sign}{number}" for sign, number in compared) != re.sub(r"\s", "", text):
            raise Refused(f"{key}: {text!r}", fits=f"expected {KEYS['heads']}")
        return [" ".join(f"{sign}{number}" for sign, number in compared)]
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        span = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
        if not span or int(span[1]) > int(span[2] or span[1]):
            raise Refused(f"{key}: {text!r}", fits=f"expected {KEYS['heads']}")
    return parts


def _compares(part: str, number: int) -> bool:
    compared = _COMPARE.findall(part)
    if compared:
        return all(_OPERATORS[sign](number, int(bound)) for sign, bound in compared)
    first, _, last = part.partition("-")
    return int(first) <= number <= int(last or first)


def _known(key: str, text: str) -> str:
    known = FEATURES if key in _SETS else (*PATTERNS, *dict.fromkeys(h for p in PATTERNS for h in p.split("-")))
    if text not in known:
        raise Refused(f"{key}: {text!r}", fits=nearest(text, known, kind="known"))
    return text


def _check_path(key: str, text: str) -> None:
    if key == "path":
        _ = glob(text)  # refuses what is no glob
    elif not re.fullmatch(r"[^.*?{}\[\]]+(\.[^.*?{}\[\]]+)*", text):
        raise Refused(f"part: {text!r}", fits=f"expected {KEYS['part']}")


def _shown(value: Any) -> str:
    return f"[{', '.join(value)}]" if isinstance(value, list) else str(value)
