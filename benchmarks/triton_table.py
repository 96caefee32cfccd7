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
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from reattend.codegen.triton import NAME, ahead
from reattend.codegen.used import Call, calls_of
from reattend.compiler.primitives.attend import attend, run
from reattend.compiler.primitives.attend_spec import AttendSpec
from reattend.compiler.primitives.merge import merge
from reattend.compiler.primitives.operator import PRIMITIVES
from reattend.compiler.primitives.packed_rows import RowSpec
from reattend.compiler.primitives.qlinear import qlinear
from reattend.compiler.primitives.qlinear_spec import QLinearSpec
from reattend.compiler.primitives.scan import scan
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
NO_PRODUCTS = ("join", "merge", "rounded")
KEYS, WIDE = 32768, 4096  # of one token; inputs and outputs of a linear layer


def drawn(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(sizes, dtype=dtype)


def one_token(dim: int) -> object:
    keys = drawn(1, HEADS, KEYS, dim)
    return attend(drawn(1, 4 * HEADS, 1, dim), keys, keys)


def stored(dim: int, bits: int, queries: int, heads: int, keys: int) -> object:
    spec = RowSpec(bits, dim, dtype="bfloat16")
    rows = torch.empty(1, HEADS, keys, spec.bytes, dtype=torch.uint8)
    return attend(drawn(1, heads, queries, dim), rows, rows, stored=(spec, spec), causal=True, align="end")


def grouped(dim: int) -> object:
    """Windows of 64 tokens that see 64 more around them, the rows read where they lie."""
    q, k, v = drawn(TOKENS // 64, HEADS, 64, dim), drawn(1, HEADS, TOKENS, dim), drawn(1, HEADS, TOKENS, dim)
    rows = torch.zeros(TOKENS // 64, 128, dtype=torch.long)
    return run(q, [k, v], [rows], AttendSpec(f"s * {dim**-0.5}", group_rows="t0"))


def scanned(dim: int, decay: tuple[int, ...], **how: Any) -> object:
    q, k, v = (drawn(1, HEADS, TOKENS, dim) for _ in range(3))
    return scan(q, k, v, log_decay=drawn(*decay, dtype=torch.float32), **how)


def merged(dim: int) -> object:
    part = drawn(1, HEADS, TOKENS, dim), drawn(1, HEADS, TOKENS, dtype=torch.float32)
    return merge([part] * 3)


def linear(group: int, rows: int, format: str, activations: str) -> object:
    spec = QLinearSpec(format, WIDE, 0 if format == "int8" else group, activations)
    of_groups: Callable[[torch.dtype], torch.Tensor] = lambda dtype: torch.zeros(WIDE, spec.groups, dtype=dtype)
    codes = torch.zeros(WIDE, WIDE // 2, dtype=torch.uint8)
    tensors = {
        "int8": [torch.zeros(WIDE, WIDE, dtype=torch.int8), torch.zeros(WIDE)],
        "int4": [codes, of_groups(torch.float16), of_groups(torch.float16)],
        "qoq": [codes, torch.zeros(WIDE, dtype=torch.float16), of_groups(torch.int8), of_groups(torch.int8)],
    }
    return qlinear(drawn(rows, WIDE), tensors[format], spec)


# of a size D: channels of a head, in a linear layer the inputs of a group
OTHERS: dict[str, Callable[[int], object]] = {
    "one token of 32,768": one_token,
    "one token of 32,768 in 8 bits": lambda dim: stored(dim, 8, 1, 4 * HEADS, KEYS),
    "one token of 32,768 in 4 bits": lambda dim: stored(dim, 4, 1, 4 * HEADS, KEYS),
    "keys and values in 8 bits": lambda dim: stored(dim, 8, TOKENS, HEADS, TOKENS),
    "keys and values in 4 bits": lambda dim: stored(dim, 4, TOKENS, HEADS, TOKENS),
    "rows of groups": grouped,
    "int8 and int8, 16 rows": lambda group: linear(group, 16, "int8", "int8"),
    "int8 and int8, 2,048 rows": lambda group: linear(group, 2048, "int8", "int8"),
    "two levels and int8, 16 rows": lambda group: linear(group, 16, "qoq", "int8"),
    "two levels and int8, 2,048 rows": lambda group: linear(group, 2048, "qoq", "int8"),
    "int4, 16 rows": lambda group: linear(group, 16, "int4", ""),
    "int4, 2,048 rows": lambda group: linear(group, 2048, "int4", ""),
    "merge of three": merged,
    "scan with a decay of a row": lambda dim: scanned(dim, (1, HEADS, TOKENS)),
    "scan over its sum": lambda dim: scanned(dim, (1, HEADS, TOKENS), feature=torch.exp, normaliser="sum"),
    "scan with a decay of a channel": lambda dim: scanned(dim, (1, HEADS, TOKENS, dim)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="*", default=list(ahead.TARGETS))
    parser.add_argument("--cases", nargs="*", default=[*CASES, *OTHERS])
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
            (call,) = calls_of(partial(asked, case, dim))
            for target in targets:
                names: list[str] = []
                for made in ahead.compiled(target, both_ways(call)):
                    names.append(made.kernel)
                    again = names.count(made.kernel)
                    kernel = made.kernel if again == 1 else f"{made.kernel} {again}"
                    yield {"case": case, "dim": dim, **asdict(made), "kernel": kernel}


def asked(case: str, dim: int) -> object:
    if case in OTHERS:
        return OTHERS[case](dim)
    q, k, v = (torch.zeros(1, HEADS, TOKENS, dim, dtype=torch.bfloat16) for _ in range(3))
    return attend(q, k, v, **CASES[case])


def both_ways(call: Call) -> Callable[[], object]:
    """The results, and the gradients of q, k, v where there are such kernels; of a token none are wanted."""
    primitive = PRIMITIVES[call.primitive]
    kernel = next(k for k in primitive.kernels["cuda"] if k.name == NAME)
    reason = kernel.refuses(call.groups, call.text)
    assert reason is None, reason

    def both() -> None:
        results = kernel.run(call.groups, call.text)
        if kernel.gradients is not None and call.groups[0][0].shape[2] > 1 and not primitive.stored(call.text):
            kernel.gradients(call.groups, call.text, results, {0: results[0]}, (0, 1, 2))

    return both


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["case"], row["dim"], row["target"], row["kernel"]


def said(row: dict[str, Any]) -> str:
    kernel = ahead.Compiled(**{k: row.get(k, 0) for k in ahead.Compiled.__annotations__})
    return f"{row['case']}, D = {row['dim']}, {kernel}"


def compared(row: dict[str, Any], before: dict[str, Any] | None) -> list[str]:
    """What became worse."""
    if before is None:
        return [f"{said(row)}: not in the table"]
    found = []
    if row["spilled"] > before["spilled"]:
        found.append(f"{said(row)}: {before['spilled']} B before")
    if bool(row["matrix"]) < bool(before["matrix"]) or bool(multiplies(row)) < bool(multiplies(before)):
        found.append(f"{said(row)}: {before['matrix']} matrix instructions before")
    if row["shared"] > ahead.TARGETS[row["target"]].shared:
        found.append(f"{said(row)}: more shared memory than there is")
    return found


def multiplies(row: dict[str, Any]) -> int:
    return int(row["matrix"] or row.get("narrow", 0))


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Generated Triton kernels, compiled",
        "",
        f"By Triton {triton.__version__} in bfloat16, default blocks, 1,024 tokens, 8 heads; nothing ran on a GPU.",
        "`python benchmarks/triton_table.py` writes this page, `--check` compares a run with it.",
        "D: channels of a head, of a linear layer the inputs of a group; one token has 32 heads over 8 of keys.",
        "registers / bytes spilled / KB of shared memory / matrix instructions / warps",
        "",
        "| case | D | kernel | " + " | ".join(ahead.TARGETS) + " |",
        "|---|---|---|" + "---|" * len(ahead.TARGETS),
    ]
    by = {key(row): row for row in rows}
    for case, dim, kernel in dict.fromkeys((r["case"], r["dim"], r["kernel"]) for r in rows):
        cells = [cell(by.get((case, dim, target, kernel))) for target in ahead.TARGETS]
        lines.append(f"| {case} | {dim} | {kernel} | {' | '.join(cells)} |")
    short = [row for row in rows if row["spilled"] or not (multiplies(row) or row["kernel"] in NO_PRODUCTS)]
    fine = f"{len(rows) - len(short)} of {len(rows)}"
    lines += ["", f"{fine} spill nothing and use matrix instructions where they multiply."]
    lines += [f"- {said(row)}" for row in short]
    return "\n".join(lines) + "\n"


def cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    return " / ".join(str(row[k]) for k in ("registers", "spilled")) + (
        f" / {row['shared'] // 1024} / {multiplies(row)} / {row['warps']}"
    )


if __name__ == "__main__":
    main()
