"""The table of mechanisms, read from their classes: for the docs, the command line and whoever asks what there is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, dataclass
from typing import Any

from .mechanism import Mechanism, mechanism, mechanisms

COLUMNS = ("mechanism", "part", "kind", "knobs", "honours", "what it is")
_INTRODUCTION = """# Mechanisms

Written by `python -m reattend mechanisms --md` from the registry.

- part: what of a site it claims. core: q, k, v → o · gate: o → o · region: x → the projected output · model: many sites
- kind: exact, approximate (training-free), or needs recovery (training)
- knobs: the keys of a recipe, with their defaults
- honours: features of a site that it carries over; a site with another one is refused, unless the recipe drops it
"""


@dataclass(frozen=True)
class Table:
    """One row per mechanism, in order of name."""

    rows: tuple[dict[str, Any], ...]

    def text(self) -> str:
        """For a terminal: one line per mechanism, its knobs below it."""
        width = max((len(row["mechanism"]) for row in self.rows), default=0)
        lines: list[str] = []
        for row in self.rows:
            lines.append(f"{row['mechanism']:{width}}  {row['part']}, {row['kind']}: {row['what it is']}")
            knobs = ", ".join(f"{name}={value!r}" for name, value in row["knobs"].items())
            lines += [f"{'':{width}}    {knobs}"] if knobs else []
        return "\n".join(lines)

    def markdown(self) -> str:
        """The page of the docs."""
        lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
        for row in self.rows:
            knobs = ", ".join(f"`{name}: {_plain(value)}`" for name, value in row["knobs"].items())
            honours = ", ".join(row["honours"])
            cells = (f"`{row['mechanism']}`", row["part"], row["kind"], knobs, honours, row["what it is"])
            lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
        return "\n".join((_INTRODUCTION, *lines))


def mechanism_table(slugs: Iterable[str] | None = None) -> Table:
    """The registered mechanisms, or some of them.

    >>> print(mechanism_table(["window"]).text())
    window  core, approximate: Sliding window with sinks: a query sees the `sinks` first and `window` last keys ...
              window=1024, sinks=4
    """
    known = mechanisms()
    chosen = known if slugs is None else {slug: type(mechanism(slug)) for slug in sorted(slugs)}
    return Table(tuple(_row(slug, cls) for slug, cls in chosen.items()))


def _row(slug: str, cls: type[Mechanism]) -> dict[str, Any]:
    knobs = {name: None if default is MISSING else default for name, (_, default) in cls.knobs().items()}
    values = (slug, cls.part, cls.kind, knobs, sorted(cls.honours), cls.summary())
    return dict(zip(COLUMNS, values, strict=True))


def _plain(value: Any) -> str:
    """As a recipe would write it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
