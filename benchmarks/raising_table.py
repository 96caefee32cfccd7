"""Every family of the zoo in every spelling: how many of its attentions are raised, and what that changes.

python benchmarks/raising_table.py [FAMILY ...] [--out docs/raising_table.md]
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
    if not given.families:
        given.out.write_text(HEAD + "\n".join(map(line, rows)) + f"\n\n{verdict} (torch {torch.__version__}).\n")
    if good < len(rows):
        raise SystemExit(1)


def line(row: Row) -> str:
    cells = row.family, row.spelling, row.sites, row.raised, f"{row.difference:.0e}", "; ".join(row.notes)
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
