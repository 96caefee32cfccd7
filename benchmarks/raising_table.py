"""Every family of the zoo in every spelling: how many of its attentions are raised, and what that changes.

python benchmarks/raising_table.py [FAMILY ...] [--out docs/raising_table.md] [--merge]

--merge puts the rows of the families named into the table that is there, each measured by this run.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console

from reattend.models.zoo import zoo
from reattend.models.zoo_raised import Row, raised_row

TOLERANCE = 1e-5
HEAD = f"""# Raising: every family, every spelling

Tiny random models in float32 on a CPU; written by `python benchmarks/raising_table.py`. *sites*: attentions that
the model has; *raised*: how many became one node; *difference*: the largest at any output, against the model itself
(at most {TOLERANCE:.0e} is asked for); *note*: what came near and was left alone.

| model | spelling | sites | raised | difference | note |
|---|---|---|---|---|---|
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("families", nargs="*")
    options.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "raising_table.md")
    options.add_argument("--merge", action="store_true")
    given = options.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(2)
    console = Console()
    rows = []
    start = time.perf_counter()
    for family in zoo().values():
        for spelling in family.spellings if not given.families or family.name in given.families else ():
            rows.append(raised_row(family, spelling))
            console.print(line(rows[-1]), highlight=False)
    good = sum(row.sites == row.raised and row.difference <= TOLERANCE for row in rows)
    verdict = f"{good} of {len(rows)} cases: exactly the expected sites, at most {TOLERANCE:.0e} apart"
    console.print(f"{verdict}, {time.perf_counter() - start:.0f} s")
    if given.merge:
        given.out.write_text(merged(given.out.read_text(), rows))
    elif not given.families:
        given.out.write_text(HEAD + "\n".join(map(line, rows)) + f"\n\n{verdict} (torch {torch.__version__}).\n")
    if good < len(rows):
        raise SystemExit(1)


def merged(page: str, rows: list[Row]) -> str:
    """The page with these rows in place of those of the same family and spelling, or behind the last one."""
    lines = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| model")]
    known = {tuple(cell.strip() for cell in text.split("|")[1:3]): text for text in lines}
    known |= {(row.family, row.spelling): line(row) for row in rows}
    cells = [[c.strip() for c in text.split("|")[3:6]] for text in known.values()]
    good = sum(sites == raised and float(difference) <= TOLERANCE for sites, raised, difference in cells)
    verdict = f"{good} of {len(known)} cases: exactly the expected sites, at most {TOLERANCE:.0e} apart"
    return HEAD + "\n".join(known.values()) + f"\n\n{verdict} (torch {torch.__version__}).\n"


def line(row: Row) -> str:
    cells = row.family, row.spelling, row.sites, row.raised, f"{row.difference:.0e}", "; ".join(row.notes)
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
