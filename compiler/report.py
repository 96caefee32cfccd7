"""The report of one optimization: the verdict first, then what changed where, what was refused, and on what data."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .cost import Cost
from .heads.table import HeadTable
from .refusal import Refused, nearest
from .showing import markdown, page, picture
from .showing.looking import joined as joined_details
from .showing.looking import view_of, view_of_rows
from .showing.view import View
from .site import Site
from .timing import Timing
from .verification import Deviation

_COLUMNS = ("site", "status", "mechanism", "deviation", "note")
NO_DATA = "random inputs: correctness only, not quality"


@dataclass(frozen=True)
class Row:
    """What happened at one site."""

    site: Site
    status: str  # rewritten | kept | refused | rolled back
    mechanism: str = ""
    kind: str = ""
    reason: str = ""
    deviation: Deviation | None = None
    exact_error: float | None = None
    before: Cost = field(default_factory=Cost)
    after: Cost = field(default_factory=Cost)
    rule: str = ""
    dropped: tuple[str, ...] = ()
    counted: tuple[str, ...] = ()  # what its mechanisms say of themselves there, by counting alone

    def __str__(self) -> str:
        *_, deviation, note = _cells(self)
        told = {
            "deviation": deviation,
            "cost": "" if self.before == self.after == Cost() else f"{self.before} -> {self.after}, predicted",
            "rule": self.rule,
            "note": note,
        }
        return "\n".join([_line(self), *(f"    {word:<11}{text}" for word, text in told.items() if text)])

    def _repr_html_(self) -> str:
        return page.part(view_of_rows((self,)))


class SiteList(Sequence[Row]):
    """The rows of all sites: by number, or by path; prints one line a site."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = tuple(rows)

    def __getitem__(self, which: Any) -> Any:
        if not isinstance(which, str):
            return self._rows[which]
        for row in self._rows:
            if row.site.path == which:
                return row
        raise Refused(f"site {which!r}", fits=nearest(which, [r.site.path for r in self._rows], kind="sites"))

    def __len__(self) -> int:
        return len(self._rows)

    def _repr_html_(self) -> str:
        return page.part(view_of_rows(self._rows))

    def __repr__(self) -> str:
        return "\n".join(map(_line, self._rows))


@dataclass
class Report:
    model: str
    recipe: str
    rows: tuple[Row, ...] = ()
    passes: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()  # exact rewrites of weights
    misses: tuple[str, ...] = ()
    output: Deviation | None = None
    captured: Deviation | None = None  # of the graph before any rewrite, from the model itself
    data: str = NO_DATA
    timing: Timing | None = None
    predicted: tuple[Cost, Cost] = (Cost(), Cost())
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    recovered: str = ""  # what training brought back
    details: Any = field(default=None, repr=False, compare=False)  # showing.looking.Details, never in files

    def verdict(self) -> str:
        """One line: sites, deviation and on what, time measured here, cost predicted."""
        count = Counter(row.status for row in self.rows)
        parts = [f"{count['rewritten']} of {len(self.rows)} sites rewritten"]
        if self.weights:
            parts.append(f"{len(self.weights)} exact rewrite" + "s" * (len(self.weights) > 1) + " of weights")
        if self.passes:
            parts.append(f"{len(self.passes)} whole-model pass" + "es" * (len(self.passes) > 1))
        elif not count["rewritten"] and not self.weights:
            parts[0] += ", NOTHING CHANGED"
        parts += [f"{count[s]} {s}" for s in ("refused", "rolled back") if count[s]]
        if self.output is not None:
            parts.append(f"output {self.output} ({self.data})")
        if self.timing is not None:
            parts.append(f"measured here: {self.timing.verdict()}")
        if self.recovered:
            parts.append(f"recovered: {self.recovered}")
        elif any(row.status == "rewritten" and row.kind == "needs recovery" for row in self.rows):
            parts.append("UNTRAINED: needs recovery")
        return "; ".join(parts)

    def text(self) -> str:
        lines = [self.verdict(), "", f"model   {self.model}", f"recipe  {self.recipe}"]
        if self.captured is not None:
            lines.append(f"graph   {self.captured}, before any rewrite, against the model itself")
        if self.timing is not None:
            t = self.timing
            lines.append(
                f"time    {t.before:.2f} ms -> {t.after:.2f} ms, medians of {t.runs} interleaved runs, {t.sizes}"
            )
        lines.append(
            f"cost    {self.predicted[0]} -> {self.predicted[1]}, predicted for the whole model at these sizes"
        )
        lines += ["", *aligned([_cells(row) for row in self.rows], _COLUMNS)]
        for title, entries in self.lists():
            lines += ["", title, *(f"  {entry}" for entry in entries)]
        return "\n".join(lines)

    __str__ = text

    def lists(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """What is said beside the table, by title."""
        named = [
            ("exact rewrites of weights", self.weights),
            ("whole-model passes", self.passes),
            ("places that look like attention and were not raised", self.misses),
            ("warnings", (*self.warnings, *self._slower())),
            ("counted, not measured", tuple(f"{r.site.path}: {line}" for r in self.rows for line in r.counted)),
            ("notes", self.notes),
        ]
        return tuple((title, tuple(entries)) for title, entries in named if entries)

    def _slower(self) -> tuple[str, ...]:
        if self.timing is None or not self.timing.slower:
            return ()
        t = self.timing
        return (
            f"slower than the original here: {t.before:.2f} ms -> {t.after:.2f} ms, {t.ratio:.2f} x ({t.spread()})",
        )

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = json.loads(
            json.dumps(asdict(replace(self, details=None)), default=_plain), parse_constant=_as_text
        )
        del plain["details"]
        return {"verdict": self.verdict()} | plain | {"warnings": [*self.warnings, *self._slower()]}

    def view(self, *, heads: HeadTable | None = None, plot: str = "", targets: Sequence[str] = ()) -> View:
        """All that the page shows, as plain values.

        plot     quality against cost, as the quality table draws it
        targets  GPUs, there or not, that kernels are compiled for, to tell their registers: "cuda:90"
        """
        return view_of(self, self.details, heads=heads, plot=plot, targets=targets)

    def html(self) -> str:
        """One page, self-contained."""
        return page.document(self.view())

    def write(self, path: str | Path) -> Path:
        """Write the page (.html), a picture (.svg), tables (.md), the facts (.json) or the text (anything else)."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        match target.suffix:
            case ".html":
                content = self.html()
            case ".json":
                content = json.dumps(self.to_dict(), indent=1)
            case ".svg":
                content = picture.table(self.view())
            case ".md":
                content = markdown.document(self.view())
            case _:
                content = self.text()
        target.write_text(content, encoding="utf-8")
        return target

    def _repr_html_(self) -> str:
        return page.part(self.view())

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """For a notebook the page, for a terminal the text, for what keeps notes the tables."""
        return {
            "text/html": self._repr_html_(),
            "text/plain": self.text(),
            "text/markdown": markdown.document(self.view()),
        }


def joined(reports: Sequence[Report]) -> Report:
    """One report for a model that was rewritten in several parts; deviations stand at the parts' own outputs."""
    first = reports[0]
    before, after = Cost(), Cost()
    for report in reports:
        before, after = before + report.predicted[0], after + report.predicted[1]
    worst = max((r.output for r in reports if r.output is not None), key=lambda d: d.relative, default=None)
    return replace(
        first,
        rows=tuple(row for report in reports for row in report.rows),
        passes=tuple(dict.fromkeys(p for report in reports for p in report.passes)),
        weights=tuple(w for report in reports for w in report.weights),
        misses=tuple(m for report in reports for m in report.misses),
        output=worst,
        predicted=(before, after),
        warnings=tuple(dict.fromkeys(w for report in reports for w in report.warnings if _everywhere(w, reports))),
        notes=tuple(n for report in reports for n in report.notes),
        details=joined_details([r.details for r in reports if r.details is not None]) if first.details else None,
    )


def _everywhere(warning: str, reports: Sequence[Report]) -> bool:
    """A rule that decides nothing in one part may decide in another: said only where it is idle in all."""
    rule, idle, _ = warning.partition(": decides nothing")
    return not idle or all(any(w.startswith(f"{rule}{idle}") for w in r.warnings) for r in reports)


def _line(row: Row) -> str:
    return f"{row.site} {row.status} {row.mechanism}".rstrip()


def _cells(row: Row) -> tuple[str, str, str, str, str]:
    note = row.reason or (f"drop={','.join(row.dropped)}" if row.dropped else "")
    if row.exact_error is not None:
        note = f"exact: float64 error {row.exact_error:.2g}" + (f"; {note}" if note else "")
    deviation = f"{row.deviation.relative:.3g} cos {row.deviation.cosine:.5f}" if row.deviation else ""
    return (str(row.site), row.status, row.mechanism, deviation, note)


def aligned(rows: Sequence[Sequence[str]], head: Sequence[str]) -> list[str]:
    widths = [max(len(r[k]) for r in (head, *rows)) for k in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in (head, *rows)]


def _as_text(number: str) -> str:
    """JSON has no infinity and no NaN: they are texts."""
    return {"Infinity": "inf", "-Infinity": "-inf"}.get(number, "nan")


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, frozenset | set) else str(value)
