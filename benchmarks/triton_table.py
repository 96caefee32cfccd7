"""What Triton makes of the generated kernels, for GPUs that need not be there: docs/triton_kernels.{json,md}.

    python benchmarks/triton_table.py [--targets cuda:90 ...] [--cases causal ...] [--dims 64 128] [--check]

--check compiles and compares with the table that is stored for this version of Triton instead of writing it: no more
spills than there, no fewer kinds of matrix instructions.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

from reattend.codegen.triton import ahead, launch, launch_gradient
from reattend.codegen.used import Call, calls_of
from reattend.compiler.primitives.attend import attend
from reattend.compiler.symbols import table

DOCS = Path(__file__).resolve().parent.parent / "docs"
HEADS, TOKENS = 8, 1024
SLOPES, BIAS = torch.ones(HEADS), torch.ones(HEADS, 2 * TOKENS - 1)
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window and sinks": {"causal": True, "keep": lambda i, j: (i - j < 256) | (j < 4)},
    "softcap": {"causal": True, "score": lambda s: torch.tanh(s / 30) * 30},
    "slopes of heads": {"causal": True, "score": lambda s, h, i, j: s + table(SLOPES)[h] * (j - i)},
    "relative bias": {"score": lambda s, h, i, j: s + table(BIAS)[h, i - j + TOKENS - 1]},
    "a sink": {"causal": True, "sink": lambda h: h * 0.5},
    "sigmoid": {"causal": True, "weight": torch.sigmoid, "normaliser": "none"},
    "relu squared over its sum": {"causal": True, "weight": lambda s: torch.relu(s) ** 2, "normaliser": "sum"},
    "stick-breaking": {"causal": True, "normaliser": "stick"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="*", default=list(ahead.TARGETS))
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--dims", nargs="*", type=int, default=[64, 128])
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    kept = DOCS / "triton_kernels.json"
    stored: dict[str, list[dict[str, Any]]] = json.loads(kept.read_text()) if kept.exists() else {}
    rows = {key(row): row for row in stored.get(triton.__version__, [])}
    if given.check and not rows:
        print(f"nothing is stored for Triton {triton.__version__}")
        return
    worse = []
    for row in compiled(given.cases, given.dims, given.targets):
        print(said(row), flush=True)
        if given.check:
            worse += compared(row, rows.get(key(row)))
        else:
            rows[key(row)] = row
            order = sorted(rows.values(), key=key)
            kept.write_text(json.dumps(stored | {triton.__version__: order}, indent=1) + "\n")
            (DOCS / "triton_kernels.md").write_text(markdown(order))
    if worse:
        sys.exit("\n".join(worse))


def compiled(cases: list[str], dims: list[int], targets: list[str]) -> Iterator[dict[str, Any]]:
    for case in cases:
        for dim in dims:
            call = asked(CASES[case], dim)
            for target in targets:
                for made in ahead.compiled(target, both_ways(call)):
                    yield {"case": case, "dim": dim, **asdict(made)}


def asked(how: dict[str, Any], dim: int) -> Call:
    q, k, v = (torch.zeros(1, HEADS, TOKENS, dim, dtype=torch.bfloat16) for _ in range(3))
    (call,) = calls_of(lambda: attend(q, k, v, **how))
    return call


def both_ways(call: Call) -> Callable[[], object]:
    """The output and the gradients of q, k, v."""
    o = call.groups[0][0]

    def run() -> None:
        launch.run(call.groups, call.text)
        launch_gradient.gradients(call.groups, call.text, [o], {0: o}, (0, 1, 2))

    return run


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["case"], row["dim"], row["target"], row["kernel"]


def said(row: dict[str, Any]) -> str:
    return f"{row['case']}, D = {row['dim']}, {ahead.Compiled(**{k: row[k] for k in ahead.Compiled.__annotations__})}"


def compared(row: dict[str, Any], before: dict[str, Any] | None) -> list[str]:
    """What became worse."""
    if before is None:
        return [f"{said(row)}: not in the table"]
    found = []
    if row["spilled"] > before["spilled"]:
        found.append(f"{said(row)}: {before['spilled']} B before")
    if bool(row["matrix"]) < bool(before["matrix"]):
        found.append(f"{said(row)}: {before['matrix']} matrix instructions before")
    if row["shared"] > ahead.TARGETS[row["target"]].shared:
        found.append(f"{said(row)}: more shared memory than there is")
    return found


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Generated Triton kernels, compiled",
        "",
        f"By Triton {triton.__version__} in bfloat16, default blocks, 1,024 tokens, 8 heads; nothing ran on a GPU.",
        "`python benchmarks/triton_table.py` writes this page, `--check` compares a run with it.",
        "registers / bytes spilled / KB of shared memory / matrix instructions / warps",
        "",
        "| case | D | kernel | " + " | ".join(ahead.TARGETS) + " |",
        "|---|---|---|" + "---|" * len(ahead.TARGETS),
    ]
    by = {key(row): row for row in rows}
    for case, dim, kernel in dict.fromkeys((r["case"], r["dim"], r["kernel"]) for r in rows):
        cells = [cell(by.get((case, dim, target, kernel))) for target in ahead.TARGETS]
        lines.append(f"| {case} | {dim} | {kernel} | {' | '.join(cells)} |")
    short = [row for row in rows if row["spilled"] or not row["matrix"]]
    lines += ["", f"{len(rows) - len(short)} of {len(rows)} spill nothing and use matrix instructions."]
    lines += [f"- {said(row)}" for row in short]
    return "\n".join(lines) + "\n"


def cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    return " / ".join(str(row[k]) for k in ("registers", "spilled")) + (
        f" / {row['shared'] // 1024} / {row['matrix']} / {row['warps']}"
    )


if __name__ == "__main__":
    main()
