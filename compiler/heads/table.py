"""The table of heads: one row each, a column for every measure; prints as text, JSON or CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..refusal import Refused, nearest
from ..site import Site


@dataclass(frozen=True)
class Head:
    """One query head of one site; a measure that is not defined there is None."""

    site: str
    head: int
    kv_head: int
    values: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class HeadTable(Sequence[Head]):
    """The heads of a model in order."""

    model: str
    sites: tuple[Site, ...]
    measures: tuple[str, ...]
    heads: tuple[Head, ...]
    notes: tuple[str, ...] = ()  # what a measure was taken on

    def __len__(self) -> int:
        return len(self.heads)

    def __getitem__(self, which: Any) -> Any:
        return self.heads[which]

    def __iter__(self) -> Iterator[Head]:
        return iter(self.heads)

    def value(self, site: str, head: int, measure: str) -> float | None:
        """One number of one head."""
        self.knows(measure)
        found = next((h for h in self.heads if h.site == site and h.head == head), None)
        if found is None:
            raise Refused(f"head {head} of {site!r}", fits=nearest(site, [s.path for s in self.sites], kind="sites"))
        return found.values[measure]

    def ranked(self, measure: str) -> tuple[Head, ...]:
        """The heads in which a measure is defined, largest first; equal ones in order of the model."""
        self.knows(measure)
        defined = [h for h in self.heads if h.values[measure] is not None]
        return tuple(sorted(defined, key=lambda h: -(h.values[measure] or 0.0)))

    def knows(self, measure: str) -> None:
        if measure not in self.measures:
            raise Refused(f"measure {measure!r}", where="heads", fits=nearest(measure, self.measures, kind="measured"))

    def text(self) -> str:
        """For a terminal."""
        head = ("site", "head", "kv", *self.measures)
        rows = [(h.site, str(h.head), str(h.kv_head), *(_said(h.values[m]) for m in self.measures)) for h in self]
        widths = [max(len(row[k]) for row in (head, *rows)) for k in range(len(head))]
        lines = [
            "  ".join(f"{cell:<{w}}" if k == 0 else f"{cell:>{w}}" for k, (cell, w) in enumerate(zip(row, widths)))
            for row in (head, *rows)
        ]
        return "\n".join([f"{self.model}: {len(self)} heads at {len(self.sites)} sites", *lines, *self.notes])

    __str__ = text
    __repr__ = text

    def to_dict(self) -> dict[str, Any]:
        rows = [{"site": h.site, "head": h.head, "kv_head": h.kv_head, **h.values} for h in self.heads]
        return {"model": self.model, "measures": list(self.measures), "notes": list(self.notes), "heads": rows}

    def json(self) -> str:
        return json.dumps(self.to_dict())

    def csv(self) -> str:
        """One line a head, numbers in full."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("site", "head", "kv_head", *self.measures))
        for h in self.heads:
            values = ("" if h.values[m] is None else repr(h.values[m]) for m in self.measures)
            writer.writerow((h.site, h.head, h.kv_head, *values))
        return out.getvalue()


def table_of(
    model: str, sites: Sequence[Site], found: Mapping[str, Mapping[str, Sequence[float]]], notes: Sequence[str] = ()
) -> HeadTable:
    """From numbers by measure and site, one for each head."""
    heads = [
        Head(site.path, h, h * site.kv_heads // site.heads, {m: _number(by[site.path][h]) for m, by in found.items()})
        for site in sites
        for h in range(site.heads)
    ]
    return HeadTable(model, tuple(sites), tuple(found), tuple(heads), tuple(notes))


def _number(value: float) -> float | None:
    plain = float(value)
    return plain if math.isfinite(plain) else None


def _said(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
