"""A loop skeleton with what a spec says put in front of it: the text that becomes a library."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib import resources

from ...compiler.symbols import Expr
from .printer import cpp


def skeleton(name: str, said: Sequence[str], *, halves: str = "") -> str:
    """Vectors and their functions, then what is said, then the loops; `halves`: products of bfloat16 by the
    processor's "units", or by loops that stand in for them, "emulated".
    """
    parts = [_text("lanes.hpp")]
    if halves:
        parts += ["#define HALVES", *(["#define EMULATED"] if halves == "emulated" else []), _text("units.hpp")]
    return "\n".join([*parts, *said, _text(name)])


@lru_cache(maxsize=8)
def _text(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def function(signature: str, e: Expr, kind: str, tables: str = "") -> str:
    """One expression as a function of the skeleton's."""
    return f"INLINE {signature} {{ return {cpp(e, kind, tables)}; }}"
