"""Passes, barriers and corrections as they are derived: of the specification's cascades, and of every mechanism.

python benchmarks/cascade_table.py [--out docs/cascades.md]
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reattend import api
from reattend.compiler.cascades.analysis import Verdict, analyse, reading
from reattend.compiler.cascades.of_mechanism import cascade_of, verdict_of
from reattend.compiler.cascades.reading import read_cascade
from reattend.compiler.refusal import Refused

ROOT = Path(__file__).parent.parent
HEAD = """# Cascades

A primitive call is a list of extended Einsums over named ranks (p queries, m keys, e and f their channels); what
follows from the equations alone is derived: passes over each input as written and with the soft barriers running
along, why a barrier is soft (a correction follows) or hard, live memory, the loops, and how the states of parts
merge. `reattend explain --math NAME` prints all of it for a mechanism or a model. The derived loops are run in the
tests and agree with the equations as written in float64 to 1e-12. An operation whose equation is not known counts as
one that needs all of what it reads.

This page is written by `python benchmarks/cascade_table.py`.

"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, default=ROOT / "docs" / "cascades.md")
    out = options.parse_args().out
    parts = [HEAD, "## Mechanisms\n", *_table("mechanism", _mechanisms()), "", "## The specification's cascades\n"]
    out.write_text("\n".join([*parts, *_table("cascade", _card())]) + "\n")
    print(f"wrote {out}")


def _table(first: str, rows: Iterator[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {first} | passes | soft: what is corrected | hard | category | held while running |"
    yield "|---|---|---|---|---|---|"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _mechanisms() -> Iterator[tuple[str, ...]]:
    for slug, cls in api.mechanisms().items():
        for causal in (False, True):
            try:
                found = verdict_of(cascade_of(cls(**cls.tries[0]), causal=causal))
            except Refused:
                continue
            yield (f"{slug}{', causal' if causal else ''}", *_row(found, [str(r) for r in found.readings]))


def _card() -> Iterator[tuple[str, ...]]:
    for case in _cases():
        found = analyse(read_cascade(case.text), case.keys.split(), case.queries.split(), poly=case.poly)
        reads = [str(reading(found.cascade, t, fiber.split(), poly=case.poly)) for t, fiber, *_ in case.reads]
        yield (case.name, *_row(found, reads))


def _row(found: Verdict, reads: list[str]) -> tuple[str, ...]:
    soft = "; ".join(f"{n} by {c}" for _, n, c in found.corrections) or "; ".join(
        b.name for b in found.barriers if b.soft
    )
    hard = "; ".join(b.name for b in found.barriers if not b.soft)
    unsafe = ", unsafe: nothing bounds an exponential" if found.unsafe else ""
    return "; ".join(reads), soft, hard, found.category + unsafe, str(found.running)


def _cases() -> Any:
    place = importlib.util.spec_from_file_location("card_cascades", ROOT / "tests" / "card_cascades.py")
    assert place is not None and place.loader is not None
    module = importlib.util.module_from_spec(place)
    import sys

    sys.modules[place.name] = module
    place.loader.exec_module(module)
    return module.CASES


if __name__ == "__main__":
    main()
