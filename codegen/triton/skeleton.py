"""A loop skeleton as text: what a spec decides is put in its place, branches that it settles are cut.

A line `if NAME:` (or `if not NAME:`, `if A and B:`) whose names are all known flags is settled here; its lines move out
one step or go, `else:` likewise. `<<name>>` alone on a line stands for statements, inside a line for a piece of text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from importlib import resources

_HOLE = re.compile(r"<<(\w+)>>")
_STEP = "    "
Said = Mapping[str, str | Sequence[str]]


def filled(name: str, flags: Mapping[str, bool], said: Said) -> str:
    """The text of a skeleton for one spec."""
    return "\n".join(line for kept in pruned(text_of(name).splitlines(), flags) for line in _holes(kept, said)) + "\n"


@lru_cache(maxsize=16)
def text_of(name: str) -> str:
    return (resources.files(__package__) / f"{name}.triton").read_text(encoding="utf-8")


def pruned(lines: Sequence[str], flags: Mapping[str, bool]) -> list[str]:
    """Lines without the branches that flags decide.

    >>> pruned(["if DEEP:", "    a = 1", "else:", "    a = 2", "b = a"], {"DEEP": False})
    ['a = 2', 'b = a']
    """
    found: list[str] = []
    at = 0
    while at < len(lines):
        holds = _settled(lines[at], flags)
        if holds is None:
            found.append(lines[at])
            at += 1
            continue
        depth = _depth(lines[at])
        first, at = _block(lines, at + 1, depth)
        second: list[str] = []
        if at < len(lines) and lines[at] == " " * depth + "else:":
            second, at = _block(lines, at + 1, depth)
        found += pruned([line.removeprefix(_STEP) for line in (first if holds else second)], flags)
    return found


def _settled(line: str, flags: Mapping[str, bool]) -> bool | None:
    text = line.partition("  #")[0].strip() if not line.lstrip().startswith("#") else ""
    if not (text.startswith("if ") and text.endswith(":")):
        return None
    parts = text[3:-1].split(" and ")
    words = [part.removeprefix("not ") for part in parts]
    if not all(word in flags for word in words):
        return None
    return all(flags[word] is not part.startswith("not ") for word, part in zip(words, parts, strict=True))


def _block(lines: Sequence[str], at: int, depth: int) -> tuple[list[str], int]:
    """The lines further in than `depth`, and where they end."""
    end = at
    while end < len(lines) and (not lines[end].strip() or _depth(lines[end]) > depth):
        end += 1
    return list(lines[at:end]), end


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip())


def _holes(line: str, said: Said) -> Iterator[str]:
    whole = _HOLE.fullmatch(line.strip())
    if whole is None:
        yield _HOLE.sub(lambda m: str(said[m[1]]), line)
        return
    lines = said[whole[1]]
    for one in [lines] if isinstance(lines, str) else lines:
        yield " " * _depth(line) + one if one else ""
