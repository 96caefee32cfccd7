"""How long rewriting takes on large models: Llama shapes on weights without memory, our part beside torch.export's.

    python benchmarks/compile_time.py [--layers 8 32 80] [--runs 3] [--torch-compile] [--json FILE]

Structural checks are included (lint after every step, shapes), numeric ones are not: there are no numbers.
Seconds are the processor's, of one thread: a loaded machine changes them little. Each row is the median of some runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

import reattend
from reattend.compiler.capture import capture
from reattend.compiler.draft import drafting
from reattend.compiler.leaves import restore_leaves
from reattend.compiler.pipeline import lower, raise_program, rewrite
from reattend.compiler.program import Store
from reattend.compiler.recipe_load import load_recipe
from reattend.compiler.steps import steps_of, vocabulary
from reattend.models.vision_ops import declare_missing_vision_ops

SHAPES = {  # layers: hidden, intermediate, heads, kv heads
    8: (4096, 11008, 32, 32),
    32: (4096, 11008, 32, 32),
    80: (8192, 28672, 64, 8),
}
RECIPE = {"version": 1, "sites": [{"match": "*", "attention": {"window": {"window": 1024, "sinks": 4}}}]}


@dataclass(frozen=True)
class Measured:
    layers: int
    dynamic: bool
    nodes: int
    export_s: float
    ours_s: float
    traced: int  # fragments traced: one per distinct site signature
    peak_mb: int

    @property
    def share(self) -> float:
        return self.ours_s / self.export_s


def llama(layers: int, device: str = "meta", **sizes: int) -> Any:
    declare_missing_vision_ops()
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, heads, kv_heads = SHAPES[layers] if not sizes else tuple(sizes.values())
    config = LlamaConfig(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=32000)  # fmt: skip
    with torch.device(device):
        return LlamaForCausalLM(config).eval()


def measure(layers: int, *, dynamic: bool, runs: int = 1) -> Measured:
    """The run with the median share of time."""
    found = sorted((_measured(layers, dynamic=dynamic) for _ in range(runs)), key=lambda m: m.share)
    return found[(runs - 1) // 2]


def _measured(layers: int, *, dynamic: bool) -> Measured:
    model = llama(layers)
    gc.collect()  # what earlier runs left is not this one's
    ids = torch.zeros(2, 128, dtype=torch.long, device="meta")
    export = _Stopwatch(torch.export.export)
    start = time.process_time()
    with drafting():
        with mock.patch("torch.export.export", export):
            captured = capture(model, (), {"input_ids": ids, "use_cache": False}, dynamic=dynamic)
        raised, _ = raise_program(captured, Store())
        steps, _ = steps_of(load_recipe(RECIPE, vocabulary()), raised.sites)
        outcome = rewrite(raised, steps)
        traced = len(outcome.program.fragments)
        lowered = lower(outcome.program, captured)
        restore_leaves(lowered.graph, model)
    lowered.graph.recompile()
    total = time.process_time() - start
    assert len(raised.sites) == layers and not outcome.refused
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return Measured(layers, dynamic, len(lowered.graph.graph.nodes), export.total, total - export.total, traced, peak)


class _Stopwatch:
    """A function with its time taken."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.total = function, 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.total += time.process_time() - start


def beside_torch_compile() -> dict[str, float]:
    """A small real copy, 32 layers of width 256: optimize() against torch.compile's first call."""
    sizes = {"hidden": 256, "intermediate": 688, "heads": 4, "kv": 4}
    model, ids = llama(32, "cpu", **sizes), torch.zeros(2, 64, dtype=torch.long)
    start = time.perf_counter()
    reattend.optimize(model, RECIPE, {"input_ids": ids, "use_cache": False}, measure=False)
    ours = time.perf_counter() - start
    start = time.perf_counter()
    with torch.no_grad():
        compiled: Any = torch.compile(model, dynamic=False)
        compiled(input_ids=ids, use_cache=False)
    return {"optimize_s": ours, "torch_compile_s": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 32, 80], choices=sorted(SHAPES))
    parser.add_argument("--torch-compile", action="store_true", help="also the side-by-side with torch.compile")
    parser.add_argument("--runs", type=int, default=3, help="of each row; the one with the median share is shown")
    parser.add_argument("--json", help="write the figures here")
    chosen = parser.parse_args()
    measure(8, dynamic=False)  # imports and caches of torch itself
    rows = [measure(layers, dynamic=dynamic, runs=chosen.runs) for dynamic in (False, True) for layers in chosen.layers]
    table = Table("layers", "sizes", "nodes", "export s", "ours s", "share", "ours ms/layer", "traced", "peak MB")
    for row in rows:
        table.add_row(str(row.layers), "dynamic" if row.dynamic else "static", str(row.nodes), f"{row.export_s:.2f}",
                      f"{row.ours_s:.2f}", f"{row.share:.0%}", f"{1e3 * row.ours_s / row.layers:.1f}",
                      str(row.traced), str(row.peak_mb))  # fmt: skip
    Console(width=120).print(table)
    facts: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__,
             "rows": [asdict(r) | {"share": r.share} for r in rows]}  # fmt: skip
    if chosen.torch_compile:
        facts |= beside_torch_compile()
        ours, theirs = facts["optimize_s"], facts["torch_compile_s"]
        print(f"32 layers of width 256: optimize {ours:.1f} s, torch.compile {theirs:.1f} s")
    if chosen.json:
        with open(chosen.json, "w", encoding="utf-8") as file:
            json.dump(facts, file, indent=1)


if __name__ == "__main__":
    main()
