"""One row: what a recipe did to a model's quality, its cost predicted and its time measured; and the file of rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ORIGINAL = "original"
MEASURED, REFUSED, FAILED = "measured", "refused", "failed"


@dataclass(frozen=True)
class Row:
    name: str
    key: str  # the hash of everything that decides the measures
    recipe: str = ""  # as canonical text
    status: str = MEASURED
    reason: str = ""  # why it was refused, or failed
    kind: str = ""  # exact | approximate | needs recovery
    untrained: bool = False  # needs recovery, and had none
    sites: tuple[int, int] = (0, 0)  # rewritten, and all
    measures: Mapping[str, float] = field(default_factory=dict)
    flops: tuple[float, float] | None = None  # predicted of one call, before and after
    bytes: tuple[float, float] | None = None
    time: tuple[float, float] | None = None  # measured of one call, milliseconds, before and after
    ratio: float | None = None  # before / after, the median within pairs
    interval: tuple[float, float] | None = None  # where that median lies; none of too few pairs
    machine: str = ""

    @property
    def predicted(self) -> float | None:
        """FLOPs in units of the original's."""
        return self.flops[1] / self.flops[0] if self.flops and self.flops[0] else None

    @property
    def measured(self) -> float | None:
        """Time in units of the original's."""
        return 1 / self.ratio if self.ratio else None

    def to_json(self) -> str:
        """On one line; what is empty is left out."""
        return json.dumps({k: v for k, v in asdict(self).items() if v or k in ("name", "key")}, allow_nan=False)

    @staticmethod
    def of_json(text: str) -> Row:
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()}
        return Row(**plain)


class Record:
    """A file with one row a line, written as soon as it is measured, so that a run that was killed goes on from there.

    A row that was refused or failed is tried again: what refused it may have changed, and it cost next to nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._rows: dict[str, Row] = {}
        for row in read(path) if path is not None and path.exists() else ():
            self._rows[row.name] = row

    def find(self, key: str) -> Row | None:
        return next((row for row in self._rows.values() if row.key == key and row.status == MEASURED), None)

    def add(self, row: Row) -> None:
        self._rows[row.name] = row
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size > 0
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + row.to_json() + "\n")

    def tidy(self, order: Sequence[Row]) -> None:
        """The rows of this run first and in order; older lines of the same names and torn lines go."""
        if self.path is None:
            return
        rows = {row.name: row for row in order} | {n: row for n, row in self._rows.items() if not _among(n, order)}
        part = self.path.with_suffix(".part")
        part.write_text("".join(row.to_json() + "\n" for row in rows.values()), encoding="utf-8")
        part.replace(self.path)


def _among(name: str, rows: Sequence[Row]) -> bool:
    return any(row.name == name for row in rows)


def read(path: Path) -> list[Row]:
    """The whole lines; one that a kill cut off is no row."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(Row.of_json(line))
        except (ValueError, TypeError, AttributeError):
            continue
    return rows
