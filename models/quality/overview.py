"""The README's table: every mechanism from the registry, beside what one shipped model lost and cost with it.

python -m reattend.models.quality.overview docs/quality/byte_lm.jsonl README.md
"""

from __future__ import annotations

import sys
from pathlib import Path

from ...compiler.catalogue import mechanism_table
from .row import MEASURED, read

HEAD = ("mechanism", "part", "kind", "FLOPs, predicted", "KL, measured", "what it is")


def overview(rows: Path) -> str:
    """A line a mechanism; without a number where it does not fit that model."""
    measured = {row.name: row for row in read(rows) if row.status == MEASURED}
    lines = [f"| {' | '.join(HEAD)} |", f"|{' --- |' * len(HEAD)}"]
    for one in mechanism_table().rows:
        row = measured.get(one["mechanism"])
        cost = f"{row.predicted:.2f} x" if row is not None and row.predicted else ""
        lost = f"{row.measures['kl']:.4f}" if row is not None and "kl" in row.measures else ""
        lost += ", untrained" if row is not None and row.untrained and lost else ""
        said = one["what it is"].replace("|", "&#124;")
        lines.append(f"| `{one['mechanism']}` | {one['part']} | {one['kind']} | {cost} | {lost} | {said} |")
    return "\n".join(lines)


def put_into(page: str, table: str) -> str:
    """The page with the table between its two marks."""
    head, mark, rest = page.partition("<!-- mechanisms -->\n")
    _, end, tail = rest.partition("\n<!-- end -->")
    return f"{head}{mark}{table}{end}{tail}"


if __name__ == "__main__":
    rows, page = map(Path, sys.argv[1:])
    page.write_text(put_into(page.read_text(encoding="utf-8"), overview(rows)), encoding="utf-8")
