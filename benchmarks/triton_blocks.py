"""Blocks of the generated kernels ranked by the roofline for GPUs that need not be there: docs/triton_blocks.md.

    python benchmarks/triton_blocks.py [--targets cuda:90 ...] [--dims 64 128]

Every candidate is compiled; one that spills is out. The page says where the default stands among them.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from triton_table import HEADS, TOKENS, asked  # type: ignore[import-not-found]

from reattend.codegen.triton import ahead, launch
from reattend.codegen.triton.blocks import Blocks, forward_blocks
from reattend.codegen.triton.roofline import forward_work, ranked
from reattend.codegen.used import calls_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "triton_blocks.md"
SHAPES = ((64, 4), (64, 8), (128, 8))  # rows, warps
CANDIDATES = [
    Blocks(rows, keys, warps, stages) for rows, warps in SHAPES for keys in (32, 64, 128) for stages in (2, 3)
]
SIZES = {"prefill": (4, 4096), "long": (1, 16384)}  # batch, tokens
HEAD = """# Blocks of the generated kernels, by the roofline

`python benchmarks/triton_blocks.py`: causal attention of 8 heads in bfloat16, candidates compiled for their registers
and shared memory, spilling ones left out; the time is the roofline's (`codegen/triton/roofline.py`), nothing ran.
rows x keys / warps / stages.

| target | D | call | first by the roofline | microseconds | default | microseconds |
|---|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="*", default=list(ahead.TARGETS))
    parser.add_argument("--dims", nargs="*", type=int, default=[64, 128])
    given = parser.parse_args()
    lines = []
    for target in given.targets:
        for dim in given.dims:
            default = forward_blocks(dim, dim, TOKENS, 16, target)
            fitting = compiled(dim, target, list(dict.fromkeys([*CANDIDATES, default])))
            for call, (batch, tokens) in SIZES.items():
                work = forward_work(batch, HEADS, HEADS, tokens, tokens, dim, dim, 0.5)
                order = ranked(work, tokens, batch * HEADS, fitting, target)
                own = next((time for time, blocks in order if blocks == default), float("nan"))
                lines.append(row(target, dim, call, order[0], default, own))
                print(lines[-1], flush=True)
    PAGE.write_text(HEAD + "\n".join(lines) + "\n")


def compiled(dim: int, target: str, candidates: list[Blocks]) -> dict[Blocks, tuple[int, int]]:
    (call,) = calls_of(partial(asked, "causal", dim))
    found = {}
    for blocks in candidates:
        (made,) = ahead.compiled(target, lambda b=blocks: launch.run(call.groups, call.text, blocks=b))  # type: ignore[misc]
        if made.fits and not made.spilled:
            found[blocks] = (made.registers, made.shared)
    return found


def row(target: str, dim: int, call: str, first: tuple[float, Blocks], default: Blocks, own: float) -> str:
    cells = [target, str(dim), call, said(first[1]), f"{first[0] * 1e6:.0f}", said(default), f"{own * 1e6:.0f}"]
    return f"| {' | '.join(cells)} |"


def said(blocks: Blocks) -> str:
    return f"{blocks.rows} x {blocks.keys} / {blocks.warps} / {blocks.stages}"


if __name__ == "__main__":
    main()
