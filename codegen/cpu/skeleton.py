"""A loop skeleton with what a spec says put in front of it: the text that becomes a library."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib import resources


def skeleton(name: str, said: Sequence[str]) -> str:
    """Vectors and their functions, then what is said, then the loops."""
    return "\n".join([_text("lanes.hpp"), *said, _text(name)])


@lru_cache(maxsize=8)
def _text(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")
