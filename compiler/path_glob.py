"""Path globs: `model.layers.{2..31}.*`, matched without backtracking.

`*` stays within a segment, `**` crosses dots (`**.attn` is `attn` at any depth), `{2..31}`, `{0..30..2}` and `{q,k}`
are alternatives, `?` is one character. A trailing `.*` takes any rest, a lone `*` everything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

from .refusal import Refused

MAX_PATTERN = 400
MAX_NUMBERS = 10_000

Step = Callable[[str, int], Iterable[int]]  # the positions a piece of the pattern can reach from one position

_TOKEN = re.compile(r"\*\*\.|\*+|\?|\{[^{}]*\}|[^*?{}\[\]]+|.", re.DOTALL)
_RANGE = re.compile(r"(\d{1,6})\.\.(\d{1,6})(?:\.\.(\d{1,6}))?")
_DASHED = re.compile(r"\d+-\d+")


@dataclass(frozen=True)
class Glob:
    """A pattern and its steps."""

    pattern: str
    steps: tuple[Step, ...]

    def matches(self, path: str) -> bool:
        reached = {0}
        for step in self.steps:
            reached = {end for start in reached for end in step(path, start)}
        return len(path) in reached


@lru_cache(maxsize=4096)
def glob(pattern: str) -> Glob:
    """The glob of a pattern.

    >>> [glob("model.layers.{2..31}.*").matches(f"model.layers.{n}.self_attn") for n in (1, 2, 31)]
    [False, True, True]
    """
    if not pattern or len(pattern) > MAX_PATTERN:
        raise Refused(f"a path of {len(pattern)} characters", fits=f"1 to {MAX_PATTERN}")
    if pattern in ("*", "**"):
        return Glob(pattern, (_any_rest,))
    body, rest = (pattern[:-2], True) if pattern.endswith(".*") else (pattern, False)
    body, rest = (body[:-3], True) if body.endswith(".**") else (body, rest)
    pieces: list[str] = _TOKEN.findall(body)
    steps = [_step(piece, n == 0 or pieces[n - 1].endswith(".")) for n, piece in enumerate(pieces)]
    return Glob(pattern, (*steps, _dot_and_rest) if rest else tuple(steps))


def _step(piece: str, at_segment: bool) -> Step:
    if piece == "**.":
        return _segments if at_segment else _through_dot
    if piece.startswith("*"):
        return _within if piece == "*" else _any_rest
    if piece == "?":
        return lambda path, at: (at + 1,) if path[at : at + 1] not in ("", ".") else ()
    if piece.startswith("{") and piece.endswith("}"):
        return _one_of(_alternatives(piece))
    if piece in "[]":
        raise Refused(f"{piece!r} in a path", fits=_BRACKETS)
    if piece in "{}":
        raise Refused(f"{piece!r} without its partner in a path", fits="{2..31} or {q,k}; braces do not nest")
    return _one_of((piece,))


_BRACKETS = "[0-15] is a set of characters (it means 0, 1 and 5): write {0..15} for a range, {0,3,7} for a choice"


def _alternatives(piece: str) -> tuple[str, ...]:
    found: list[str] = []
    for part in piece[1:-1].split(","):
        numbers = _RANGE.fullmatch(part.strip())
        if not numbers:
            found.append(part.strip())
            continue
        first, last, stride = (int(text or 1) for text in numbers.groups())
        if first > last or not stride or (last - first) // stride > MAX_NUMBERS:
            raise Refused(f"{part.strip()!r} in a path", fits="{first..last}, first <= last, or {first..last..step}")
        found += map(str, range(first, last + 1, stride))
    if "" in found or any(".." in part or _DASHED.fullmatch(part) for part in found):
        raise Refused(f"{piece!r} in a path", fits="{2..31}, {0..30..2} or {q,k}")
    return tuple(dict.fromkeys(found))


def _one_of(texts: tuple[str, ...]) -> Step:
    return lambda path, at: {at + len(text) for text in texts if path.startswith(text, at)}


def _within(path: str, at: int) -> range:
    dot = path.find(".", at)
    return range(at, (dot if dot >= 0 else len(path)) + 1)


def _any_rest(path: str, at: int) -> range:
    return range(at, len(path) + 1)


def _segments(path: str, at: int) -> set[int]:
    return {at} | _through_dot(path, at)


def _through_dot(path: str, at: int) -> set[int]:
    return {n + 1 for n in range(at, len(path)) if path[n] == "."}


def _dot_and_rest(path: str, at: int) -> tuple[int, ...]:
    return (len(path),) if path[at : at + 1] == "." and at + 1 < len(path) else ()
