"""What every mechanism is made of: its files and lines, the primitives it calls, the kernels that run them.

    python benchmarks/mechanisms_built.py > docs/mechanisms_built.md

Kernels are those of this machine's CPU and of Triton for a small problem of every pattern on which it stands; where
there is none the reason is the primitive's own.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import reattend
import reattend.codegen.cpu
import reattend.codegen.triton
import reattend.passes
from reattend.compiler.check import variants
from reattend.compiler.kernel_status import kernel_status
from reattend.compiler.mechanism import Mechanism, mechanisms

ROOT = Path(reattend.__path__[0]).resolve()
HEAD = """# What mechanisms are made of

Written by `python benchmarks/mechanisms_built.py > docs/mechanisms_built.md`: the files that adding a mechanism touched
besides its import line in `passes/__init__.py` (its own, and those beside it that it imports), their lines, the
primitives that it calls and the kernels that ran a small problem: generated where the name says so, else torch's
operations with the primitive's own reason. `reattend check NAME` shows the same for one, knob by knob.
What each reason would take: "no kernel yet" (group, route, gather, merge, reduce_kv on a CPU, prefix on a GPU) a loop
over rows in the manner of `codegen/cpu`; most move rows, a small part of what a mechanism costs. "plain torch
operations" are convolutions, products and pools that torch has kernels for. In the graph of a model on a GPU `group` is
folded into the loads of the attend that reads its rows ([triton.md](triton.md)); here each primitive is called alone.

| mechanism | files | lines | primitives | CPU | Triton |
|---|---|---|---|---|---|"""


def files_of(cls: type[Mechanism]) -> list[Path]:
    """The mechanism's file and those of its folder that it imports."""
    own = Path(inspect.getfile(cls)).resolve()
    beside = re.findall(r"^from \.(\w+) import", own.read_text(encoding="utf-8"), re.MULTILINE)
    return [own, *(own.parent / f"{name}.py" for name in beside)]


def row(slug: str, cls: type[Mechanism]) -> str:
    files = files_of(cls)
    lines = [len(file.read_text(encoding="utf-8").splitlines()) for file in files]
    found = [line for m in variants(cls) for line in kernel_status(m)]
    said = {target: _joined(found, target) for target in ("cpu", "triton")}
    called = sorted(set(re.findall(r"(?:^|; )(\w+) (?:by|in plain)", "; ".join(said.values()).replace("<br>", "; "))))
    names = ", ".join(f"`{file.relative_to(ROOT)}`" for file in files)
    cells = (f"`{slug}`", names, " + ".join(map(str, lines)), ", ".join(called) or "none", said["cpu"], said["triton"])
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _joined(found: list[str], target: str) -> str:
    roads = [line.removeprefix(target).strip() for line in found if line.startswith(target)]
    parts = [part for road in roads for part in re.sub(r" \[[^]]*\]$", "", road).split("; ")]
    return "<br>".join(dict.fromkeys(parts)) or "whole-model pass"


def page() -> Iterator[str]:
    yield HEAD
    for slug, cls in mechanisms().items():
        yield row(slug, cls)
        print(slug, file=sys.stderr, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("\n".join(page()))
