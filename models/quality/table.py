"""What was found of one model: rows as text, markdown, JSON and a plot, and the files that hold them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...compiler.refusal import Refused, nearest
from ...compiler.report import aligned
from .plot import svg
from .row import MEASURED, ORIGINAL, Row
from .task import Measure

UNTRAINED = "UNTRAINED: needs recovery"


@dataclass(frozen=True)
class Quality:
    """The rows of one model on one task, the original first; `found["window"]` is one of them."""

    model: str
    task: str
    measures: tuple[Measure, ...]
    settings: Mapping[str, Any]
    rows: tuple[Row, ...]

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise Refused(f"row {name!r}", fits=nearest(name, [row.name for row in self.rows], kind="rows"))

    def verdict(self) -> str:
        count = Counter(row.status for row in self.rows[1:])
        parts = [f"{number} {status}" for status, number in sorted(count.items())]
        return f"{self.model} on {self.task}: {', '.join(parts) or 'the original alone'}"

    def text(self) -> str:
        """For a terminal: the table, then what the columns mean and why rows are missing."""
        head, *rows = self._cells()
        lines = [self.verdict(), "", *aligned(rows, head), "", *(f"{m.name}: {m.says}" for m in self.measures)]
        reasons = [f"{row.name}: {row.status}: {row.reason}" for row in self.rows if row.reason]
        return "\n".join([*lines, *(["", *reasons] if reasons else [])])

    __str__ = text

    def markdown(self) -> str:
        """The page of the docs."""
        head, *rows = (" | ".join(cell.replace("|", "\\|") for cell in cells) for cells in self._cells())
        table = [f"| {head} |", "|" + " --- |" * len(self._cells()[0]), *(f"| {row} |" for row in rows)]
        means = [f"- {m.name}: {m.says}; {'more' if m.up else 'less'} is better" for m in self.measures]
        reasons = [f"- {row.name}: {row.status}: {row.reason}" for row in self.rows if row.reason]
        settings = ", ".join(f"{name} {_short(value)}" for name, value in self.settings.items())
        page = [f"# Quality of {self.model}", "", f"{self.verdict()}.", "", *table, "", *means, *_COSTS, "",
                f"Task: {settings}."]  # fmt: skip
        page += [f"Times: {machine}." for machine in sorted({row.machine for row in self.rows if row.time})]
        return "\n".join([*page, *(["", "Not measured:", "", *reasons] if reasons else [])]) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can say it."""
        measures = [asdict(measure) for measure in self.measures]
        rows = [asdict(row) | {"predicted": row.predicted, "measured": row.measured} for row in self.rows]
        return {"model": self.model, "task": self.task, "settings": dict(self.settings), "measures": measures,
                "rows": rows}  # fmt: skip

    def svg(self) -> str:
        """The first measure of every row against its predicted and its measured cost."""
        return svg(self.model, self.measures[0], self.rows)

    def write(self, out: str | Path) -> tuple[Path, Path]:
        """NAME.md and NAME.svg in a folder."""
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        page, plot = (folder / f"{file_name(self.model)}{ending}" for ending in (".md", ".svg"))
        shown = f"\n![quality against cost]({plot.name})\n"
        page.write_text(self.markdown() + shown, encoding="utf-8")
        plot.write_text(self.svg(), encoding="utf-8")
        return page, plot

    def _cells(self) -> list[list[str]]:
        head = ["row", "kind", "sites", *(m.name for m in self.measures), "FLOPs, predicted", "time, measured"]
        return [head, *(list(self._row(row)) for row in self.rows)]

    def _row(self, row: Row) -> Iterator[str]:
        yield row.name
        yield UNTRAINED if row.untrained else row.kind
        yield f"{row.sites[0]}/{row.sites[1]}" if row.sites[1] else ""
        for place, measure in enumerate(self.measures):
            if row.status == MEASURED:
                yield format(row.measures[measure.name], measure.form) if measure.name in row.measures else ""
            else:
                yield row.status if place == 0 else ""
        yield f"{row.predicted:.3f} x" if row.predicted else "1" * (row.name == ORIGINAL)
        yield _time(row)


_COSTS = (
    "- FLOPs, predicted: of one call, in units of the original's, from shapes alone",
    "- time, measured: of one call, in units of the original's: the median of interleaved pairs and where it lies with "
    "95 % confidence",
    "- kind: exact, approximate (needs no training), or UNTRAINED: it has to be trained before it is of use",
)


def file_name(model: str) -> str:
    """A model's name as the name of its files.

    >>> file_name("hf:some/folder")
    'hf_some_folder'
    """
    return re.sub(r"[^\w.-]+", "_", model).strip("_") or "model"


def _time(row: Row) -> str:
    if row.measured is None:
        return "1" * (row.name == ORIGINAL)
    spread = f"{1 / row.interval[1]:.2f} .. {1 / row.interval[0]:.2f}" if row.interval else "too few runs"
    return f"{row.measured:.2f} x ({spread})"


def _short(value: Any) -> str:
    """Hashes by their first digits."""
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return value[:12]
    return "/".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
