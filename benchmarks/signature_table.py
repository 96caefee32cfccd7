"""Every family of the zoo, optimized without example inputs, at every kind of call: equal to the original, or refused.

python benchmarks/signature_table.py [FAMILY ...] [--out docs/signature_table.md] [--again]
Families that already stand in the table are kept unless --again, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import logging
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

import reattend
from reattend.compiler.refusal import Refused
from reattend.models.zoo import zoo
from reattend.models.zoo_calls import KINDS, Answer, answers, reference
from reattend.models.zoo_family import Family

HEAD = f"""# Signatures: every family, every kind of call

Tiny random models in float32 on a CPU, `optimize(model, "exact")` without example inputs, then called in other ways;
written by `python benchmarks/signature_table.py` (torch {torch.__version__}). A number is the largest difference from
the original at any output, of the same types and names (asked for: 1e-5; bf16, relative to the largest value: 8
roundings).
*refused*: a clear no, its reason below.
*as original*: both raise. *-*: the model takes no such call.

| model | {" | ".join(kind.name for kind in KINDS)} |
|---|{"---|" * len(KINDS)}
"""
BETWEEN = "\n## Why not\n\n"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("families", nargs="*")
    options.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "signature_table.md")
    options.add_argument("--again", action="store_true")
    given = options.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    rows: dict[str, str] = {}
    reasons: dict[str, list[str]] = {}
    if given.out.exists():
        rows, reasons = _read(given.out.read_text())
    wanted = [f for f in zoo().values() if not given.families or f.name in given.families]
    bar = tqdm([f for f in wanted if given.again or f.name not in rows])
    for family in bar:
        bar.set_description(family.name)
        found = measured(family)
        rows[family.name] = f"| {family.name} | {' | '.join(map(str, found))} |"
        reasons[family.name] = [f"- {family.name}, {a.kind}: {_short(a.reason)}" for a in found if a.reason]
        given.out.write_text(_text(rows, reasons))


def measured(family: Family) -> list[Answer]:
    model = reference(family)
    try:
        fast = reattend.optimize(copy.deepcopy(model), "exact", measure=False, max_signatures=64)
    except Refused as refused:
        return [Answer(KINDS[0].name, "refused", reason=str(refused)), *(Answer(k.name, "-") for k in KINDS[1:])]
    return list(answers(model, fast, family.inputs()))


def _short(reason: str) -> str:
    text = " ".join(reason.split()).replace("|", "/")
    return text if len(text) <= 240 else f"{text[:240]}…"


def _text(rows: dict[str, str], reasons: dict[str, list[str]]) -> str:
    order = [name for name in zoo() if name in rows]
    wrong = sum(rows[name].count("| wrong") for name in order)
    said = [line for name in order for line in reasons.get(name, [])]
    verdict = f"\n{len(order)} of {len(zoo())} families; {wrong} answers differ from the original.\n"
    return HEAD + "\n".join(rows[name] for name in order) + "\n" + verdict + BETWEEN + "\n".join(said) + "\n"


def _read(text: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    table, _, below = text.partition(BETWEEN)
    lines = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| model |")]
    rows = {line.split("|")[1].strip(): line for line in lines}
    reasons: dict[str, list[str]] = {}
    for line in below.splitlines():
        if line.startswith("- "):
            reasons.setdefault(line[2:].partition(",")[0], []).append(line)
    return rows, reasons


if __name__ == "__main__":
    main()
