"""How fast mechanisms are beside sdpa at growing lengths, one head on one thread: docs/mechanism_speed.{json,md}.

    python benchmarks/mechanism_speed.py [--only window s2] [--tokens 1024 4096 16384] [--again] [--real-time]

Each row is a process of its own: the first call builds kernels and is not timed, then sdpa (causal as the site) and the
mechanism, traced as a rewritten model holds it, take turns; medians and the median ratio of the pairs are kept. Rows
that stand in the JSON are not run again.
The bound: pairs of 64 x 64 tiles that the mechanism's predicate leaves, against those of the site's softmax.
--real-time asks the system for its highest priority while a row is timed, and other work then waits.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from memory import standing  # type: ignore[import-not-found]  # the script beside this one
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.functional import scaled_dot_product_attention

import reattend.codegen.cpu
import reattend.passes  # noqa: F401 - registers the mechanisms
from reattend.codegen.used import calls_of
from reattend.compiler.case import Case
from reattend.compiler.mechanism import Mechanism
from reattend.compiler.place import values_at
from reattend.compiler.primitives.attend_spec import AttendSpec
from reattend.compiler.primitives.operator import watched
from reattend.compiler.refusal import Refused
from reattend.compiler.symbol_text import parse
from reattend.compiler.symbols import const
from reattend.compiler.tiles import tiles_of
from reattend.compiler.timing import interleave, timing_of
from reattend.compiler.tracing import Setting, trace

DOCS = Path(__file__).resolve().parent.parent / "docs"
TOKENS, ROOM = (1024, 4096, 16384), 12 * 10**9
# by mechanism: knobs where the defaults are dense, or not for such lengths
KNOBS: dict[str, dict[str, Any]] = {
    "agent": {}, "agent_sd": {}, "inline": {}, "lightning": {}, "based": {}, "flow": {}, "slab": {}, "rat": {},
    "aaren": {}, "l2vit": {}, "retnet_gmm": {}, "titans": {"chunk_size": 64},
    "s2": {}, "moa": {"alpha": 1024.0, "beta": 0.0, "max_new_tokens": 0},
    "seer": {"method": "nz_ratio", "nz_ratio": 0.2}, "landmark": {}, "cca": {}, "hyper": {}, "combiner": {},
    "neighborhood": {}, "biformer": {}, "hilo": {}, "halo": {}, "davit": {}, "super_token": {}, "transnext": {},
    "sigmoid": {}, "lssar": {}, "ssa": {}, "gpsa": {}, "music_rel": {}, "urpe": {}, "complexformer": {},
    "moh": {}, "kd_gqa": {}, "stickbreaking": {}, "duo": {"threshold": 2.0},
}  # fmt: skip


def measured(slug: str, tokens: int, seconds: float, *, real_time: bool) -> dict[str, Any]:
    case: Case = standing(slug, KNOBS[slug], tokens)
    tensors = case.tensors()
    place, own = case.place(tensors), case.own()
    q, k, v = (tensors.get(port, tensors.get("o", tensors.get("x", torch.empty(0))[:, None])) for port in "qkv")
    values = values_at(case.mechanism, place, own)
    with torch.no_grad():
        graph, given = graph_of(case.mechanism, Setting(place.site, place.spec), values), tuple(values.values())
        ours: Callable[[], object] = lambda: graph(*given)
        with watched() as ran:
            ours()
        roads = dict.fromkeys(f"{r.primitive}: {r.kernel or 'plain torch'}" for r in ran)
        if real_time:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        causal = case.pattern.startswith("causal")
        took = interleave(
            lambda: scaled_dot_product_attention(q, k, v, is_causal=causal), ours, runs=9, seconds=seconds
        )
        if real_time:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        timing = timing_of(took, str(tokens))
        bound = bound_of(case, ours)
    where = f"{case.pattern}, {case.grid.h} x {case.grid.w}" if case.grid else case.pattern
    return {"site": where, "how": ", ".join(roads) or "plain torch", "sdpa_ms": timing.before, "ms": timing.after,
            "ratio": timing.ratio, "pairs": timing.runs, "bound": bound}  # fmt: skip


def graph_of(mechanism: Mechanism, setting: Setting, values: Mapping[str, torch.Tensor]) -> GraphModule:
    """The mechanism as a rewritten model holds it: of open sizes, of these where it needs to know them."""
    try:
        return trace(mechanism, setting, values).graph
    except Refused:
        fake = FakeTensorMode(shape_env=ShapeEnv())
        known = {name: fake.from_tensor(t, static_shapes=True) for name, t in values.items()}
        return trace(mechanism, setting, known).graph


def bound_of(case: Case, ours: Callable[[], object]) -> float | None:
    """How many times fewer tiles its one `attend` visits than softmax does; None where that is not counted."""
    calls = [call for call in calls_of(ours) if call.primitive == "attend"]
    if len(calls) != 1 or case.alone:
        return None
    q, k = calls[0].groups[0][0], calls[0].groups[1][0]
    if not q.shape[2] == k.shape[2] == case.n:
        return None
    spec = AttendSpec.of(calls[0].text)
    if not spec.keep:
        return None
    plain = "j <= i" if case.pattern.startswith("causal") else ""
    try:
        kept = tiles_of(parse(spec.keep).replace({"h": const(0)}), case.n, case.n).counts
    except (Refused, ValueError, KeyError, TypeError):
        return None
    whole = -(-case.n // 64)
    all_tiles = whole * (whole + 1) // 2 if plain else whole**2
    fewer = all_tiles / max(1, kept[1] + kept[2])
    return float(fewer) if fewer > 1 else None


def in_a_child(slug: str, tokens: int, seconds: float, *, real_time: bool) -> dict[str, Any]:
    """The row, of a forked process that may not grow or run without end."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        os.close(ours)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + ROOM,) * 2)
        signal.alarm(int(60 * seconds) + 30)
        try:
            found = measured(slug, tokens, seconds, real_time=real_time)
        except (Exception, SystemExit) as error:  # a row that fails is a row
            found = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"}
        os.write(theirs, json.dumps(found).encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return dict(json.loads(said)) if said else {"failed": "stopped: too slow"}


def page(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    lengths = sorted({int(name.split()[1]) for name in rows})
    yield f"| mechanism | site | {' | '.join(f'{n} tokens: ms, x sdpa' for n in lengths)} | of the bound | how |"
    yield "|---|---|" + "---|" * (len(lengths) + 2)
    for slug in KNOBS:
        own = {n: rows[f"{slug} {n}"] for n in lengths if f"{slug} {n}" in rows}
        good = [row for row in own.values() if "ms" in row]
        if not good:
            continue
        said = ", ".join(f"{name}={value}" for name, value in KNOBS[slug].items())
        cells = [_cell(own.get(n)) for n in lengths]
        last = good[-1]
        share = f"{last['ratio'] / last['bound']:.0%} of {last['bound']:.1f} x" if last["bound"] else ""
        site = last["site"].partition(",")[0]
        yield f"| `{slug}{f'({said})' if said else ''}` | {site} | {' | '.join(cells)} | {share} | {last['how']} |"


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['ms']:.3g}, {row['ratio']:.2f} x" if "ms" in row else str(row["failed"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(KNOBS), choices=list(KNOBS))
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    parser.add_argument("--seconds", type=float, default=0.4)
    parser.add_argument("--again", action="store_true", help="measure what stands in the JSON anew")
    parser.add_argument("--real-time", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)  # a forked process has no other threads
    stored = DOCS / "mechanism_speed.json"
    rows = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else {}
    for tokens in given.tokens:
        for slug in given.only:
            name = f"{slug} {tokens}"
            if name in rows and "ms" in rows[name] and not given.again:
                continue
            rows[name] = in_a_child(slug, tokens, given.seconds, real_time=given.real_time)
            print(name, _cell(rows[name]), rows[name].get("how", ""), flush=True)
            stored.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    path = DOCS / "mechanism_speed.md"
    if path.exists():
        head, rule, _ = path.read_text(encoding="utf-8").partition("\n---\n")
        path.write_text(head + rule + "\n" + "\n".join(page(rows)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
