"""What mechanisms that claim less than quadratic cost hold at once at 65,536 tokens: beyond inputs and output, <= 1 GB.

    python benchmarks/memory.py [--only window linear] [--tokens 65536] [--eager] [--md docs/memory.md]

One head of 64 channels, float32, no gradients. Each runs in a process of its own that may not grow by more than
`--room` GB nor run for more than `--seconds`. The peak is that of all that torch allocates in the first call, less the
output; an N x N tensor would be 4 GB in booleans. --eager takes the generated kernels away. The work space of generated
C++ is its own and not seen.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import reattend.passes  # noqa: F401 - registers the mechanisms
from reattend.compiler.case import Case
from reattend.compiler.mechanism import mechanism
from reattend.compiler.peak_memory import peak_bytes
from reattend.compiler.place import run
from reattend.compiler.primitives.operator import PRIMITIVES, watched
from reattend.compiler.site import Grid

HEADS, DIM, LIMIT = 1, 64, 10**9
# by mechanism: the knobs of one that is meant for such lengths, where the defaults are not
CLAIM: dict[str, dict[str, Any]] = {
    "aaren": {}, "agent": {}, "agent_sd": {"sx": 16, "sy": 16, "agent_ratio": 0.999}, "based": {},
    "biformer": {"regions": (32, 32)}, "cca": {"group_size": 256}, "combiner": {"seg_len": 256}, "davit": {},
    "flow": {}, "halo": {}, "hilo": {"alpha": 1.0}, "hyper": {}, "inline": {}, "l2vit": {}, "lightning": {},
    "linear": {}, "moa": {"beta": 0.0, "alpha": 1024.0}, "msw_msa": {"windows": (16, 16)}, "neighborhood": {},
    "poolformer": {}, "rat": {"chunk_size": 256}, "s2": {}, "seer": {}, "slab": {}, "super_token": {},
    "titans": {"chunk_size": 256}, "transnext": {"sr_ratio": 16}, "window": {},
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    mechanism: str
    where: str
    peak: int = 0
    output: int = 0
    road: str = ""
    failed: str = ""

    @property
    def beyond(self) -> int:
        return self.peak - self.output

    @property
    def verdict(self) -> str:
        return self.failed or ("yes" if self.beyond <= LIMIT else "no")


def row(slug: str, knobs: Mapping[str, Any], tokens: int) -> Row:
    case = standing(slug, knobs, tokens)
    where = f"{case.pattern}, {case.grid.h} x {case.grid.w}" if case.grid else case.pattern
    place, own = case.place(case.tensors()), case.own()
    answer: list[torch.Tensor] = []

    def once() -> None:
        answer[:] = [run(case.mechanism, place, own)[0]]

    with torch.no_grad(), watched() as ran:
        peak = peak_bytes(once, warm=False)
    roads = dict.fromkeys(f"{r.primitive}: {r.kernel or 'plain torch'}" for r in ran)
    output = answer[0].untyped_storage().nbytes()
    said = ", ".join(f"{name}={value}" for name, value in knobs.items())
    return Row(f"{slug}({said})" if said else slug, where, peak, output, ", ".join(roads) or "plain torch")


def standing(slug: str, knobs: Mapping[str, Any], tokens: int) -> Case:
    """The first pattern on which the mechanism stands; a square picture where it needs one."""
    side = int(tokens**0.5)
    picture = Grid(side, tokens // side)
    for pattern in ("causal-self", "noncausal-self"):
        for grid in (None, picture):
            case = Case(mechanism(slug, **knobs), pattern, tokens, tokens, grid, HEADS, 1, torch.float32, HEADS, DIM)
            if case.stands:
                return case
    raise SystemExit(f"{slug} stands nowhere: {case.refused()}")


def in_a_child(slug: str, tokens: int, *, eager: bool, room: float, seconds: int) -> Row:
    """The row, measured in a forked process that may grow by `room` GB."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        os.close(ours)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + int(room * 1e9),) * 2)
        signal.alarm(seconds)
        if eager:
            for primitive in PRIMITIVES.values():
                primitive.kernels.clear()
        try:
            found = row(slug, CLAIM[slug], tokens)
        except (RuntimeError, MemoryError) as error:
            found = Row(slug, "", failed=f"stopped: {str(error).splitlines()[0][:60]}")
        os.write(theirs, json.dumps(found.__dict__).encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return Row(**json.loads(said)) if said else Row(slug, "", failed=f"stopped after {seconds} s")


def page(rows: Iterable[Row]) -> Iterator[str]:
    yield f"| mechanism | site | MB beyond inputs and output | <= {LIMIT // 10**6} | how |"
    yield "|---|---|---|---|---|"
    for r in rows:
        yield f"| `{r.mechanism}` | {r.where} | {r.beyond / 1e6:.0f} | {r.verdict} | {r.road} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(CLAIM))
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--room", type=float, default=6.0)
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--md", type=Path, help="put the table behind the page's first rule")
    given = parser.parse_args()
    torch.set_num_threads(1)  # a forked process has no other threads
    rows = (in_a_child(slug, given.tokens, eager=given.eager, room=given.room, seconds=given.seconds)
            for slug in given.only)  # fmt: skip
    lines = []
    for line in page(rows):
        print(line, flush=True)
        lines.append(line)
    if given.md:
        head = given.md.read_text(encoding="utf-8").partition("\n---\n")[0]
        given.md.write_text(f"{head}\n---\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
