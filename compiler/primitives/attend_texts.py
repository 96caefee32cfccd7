"""What a call of `attend` asks for, as the texts of its spec."""

from __future__ import annotations

from typing import Any

from ..refusal import Refused
from ..symbols import FALSE, TRUE, Expr, name
from .attend_asked import Asked, Segment
from .attend_spec import IN_ORDER
from .tables import Tables

INDICES = {n: name(n) for n in ("b", "h", "i", "j", "N", "M")}  # what a predicate, a score or an index may ask for
ROW_INDICES = {n: INDICES[n] for n in ("b", "h", "i")}  # the same of what is said once for a row
_WEIGHT_NAMES = {"s": name("s"), **ROW_INDICES}


def terms_of(asked: Asked) -> dict[str, Expr]:
    """The relative terms by the names that functions ask for them by."""
    return {n: name(n) for n in [f"r{number}" for number in range(len(asked.relative))]} if asked.relative else {}


def with_terms(asked: Asked) -> Expr:
    """q.k with the relative terms beside it."""
    return sum(terms_of(asked).values(), name("s"))


def segment_texts(
    tables: Tables, part: Segment, scaled: Expr, terms: dict[str, Expr], *, causal: bool
) -> tuple[str, str, str]:
    """Keep, score and positions of one segment."""
    keep = _predicate(tables.text(part.keep, INDICES, "keep", IN_ORDER if causal else None))
    known = {"s": scaled, **INDICES, **terms}
    score = scaled.text if part.score is None else tables.text(part.score, known, "score")
    return keep, score, tables.name_of(part.positions)


def row_texts(tables: Tables, asked: Asked) -> dict[str, Any]:
    """How scores become weights."""
    return {
        "weight": weight_text(tables, asked),
        "sink": tables.text(asked.sink, ROW_INDICES, "sink"),
        "after": after_text(tables, asked, name("w")),
    }


def weight_text(tables: Tables, asked: Asked) -> str:
    return tables.text(asked.weight, _WEIGHT_NAMES, "weight")


def after_text(tables: Tables, asked: Asked, weight: Expr) -> str:
    return tables.text(asked.after, {"w": weight, **INDICES, **terms_of(asked)}, "after")


def source_texts(tables: Tables, asked: Asked) -> dict[str, Any]:
    """What a spec says beyond scores: gathered rows, relative terms, tile lists, key heads, groups."""
    _check_sources(asked)
    rows = tuple(tables.name_of(part.rows) for part in asked.every)
    tiles = asked.tiles
    return {
        "rows": rows if any(rows) else (),
        "relative": tuple(
            (tables.name_of(term.table), tables.text(term.index, INDICES, "index"), term.of) for term in asked.relative
        ),
        "tiles": () if tiles is None else (tables.name_of(tiles.table), tiles.queries, tiles.keys),
        "kv_heads": tables.name_of(asked.kv_heads),
        "leader": tables.text(asked.leader, INDICES, "leader"),
    }


def _check_sources(asked: Asked) -> None:
    """What the texts would no longer show."""
    main, tiles = asked.main, asked.tiles
    unknown = [term.of for term in asked.relative if term.of not in ("q", "k")]
    if unknown:
        raise Refused(f"a relative term of {unknown[0]!r}", where="attend", fits="q or k")
    if tiles is not None and (main.rows is not None or tiles.queries < 1 or tiles.keys < 1):
        gathered = " over gathered rows" if main.rows is not None else ""
        found = f"tiles of {tiles.queries} x {tiles.keys}{gathered}"
        raise Refused(found, where="attend", fits="tiles of at least 1 x 1 over keys in order")
    if asked.leader is not None and (main.rows is not None or main.positions is not None):
        raise Refused("groups over gathered or moved keys", where="attend", fits="keys in order, j = 0, 1, ...")


def _predicate(keep: str) -> str:
    if keep == FALSE.text:
        raise Refused("a predicate that keeps no key", where="attend")
    return "" if keep == TRUE.text else keep
