"""What recovery brings back on the shipped models, 15 minutes a row on 2 cores: docs/recovery.{json,md}.

    python benchmarks/recovery.py [--only half-window all-linear vit-agent] [--steps N] [--out out/recovery]

A row that stands in the JSON is not run again; a row that was stopped goes on from its last judgement.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import reattend
from reattend.compiler.doctor import cpu_flags
from reattend.compiler.hosting import original
from reattend.models.load import load_model
from reattend.models.training.language import Phase, Plan, batch, byte_llama, judged
from reattend.models.training.text import standard_library
from reattend.passes.linear.linear import FEATURES

DOCS = Path(__file__).resolve().parent.parent / "docs"
HALVES = bool({"avx512_bf16", "amx_bf16"} & cpu_flags())  # elsewhere bfloat16 is slower than float32
WINDOW = {"window": {"window": 64, "sinks": 4}}
ROWS = {"short": Plan(tokens=4096, seed=7, phases=(Phase(1, 512, 0.15),)),
        "long": Plan(tokens=4096, seed=7, phases=(Phase(1, 2048, 0.15),))}  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """What the rows share: where to write, how long to train, how the models are loaded."""

    out: Path
    steps: int | None
    context: int
    language: Callable[[], Any]


def everywhere(attention: Any, layers: str = "") -> dict[str, Any]:
    return {"version": 1, "sites": [{"match": {"layer": layers} if layers else "*", "attention": attention}]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--steps", type=int, help="in the place of each row's own number")
    parser.add_argument("--context", type=int, default=2048, help="bytes that the language model is judged at")
    parser.add_argument("--out", type=Path, default=Path("out/recovery"))
    parser.add_argument("--docs", type=Path, default=DOCS)
    parser.add_argument("--checkpoint", type=Path, help="a training checkpoint in the place of the shipped byte model")
    given = parser.parse_args()
    bench = Bench(given.out, given.steps, given.context, lambda: language(given.checkpoint))
    kept = given.docs / "recovery.json"
    rows = json.loads(kept.read_text()) if kept.exists() else {}
    for name in given.only:
        if name not in rows:
            rows[name] = CASES[name](bench)
            kept.write_text(json.dumps(rows, indent=1) + "\n")
            (given.docs / "recovery.md").write_text(page(rows))
        print(json.dumps({name: rows[name]}, indent=1), flush=True)


def language(checkpoint: Path | None) -> Any:
    if checkpoint is None:
        return load_model("byte_lm").model.float().eval()
    model = byte_llama()
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    return model.eval()


# --- the rows ---------------------------------------------------------------------------------------------------------


def half_window(bench: Bench) -> dict[str, Any]:
    """Every second site sees the 64 latest bytes; as many steps as 15 minutes hold on 2 cores with matrix units."""
    return bench_language(bench, "half-window", everywhere(WINDOW, "odd"), train="all", lr=6e-4, transfer=0.1,
                          bfloat16=HALVES, steps=600)  # fmt: skip


def half_window_longer(bench: Bench) -> dict[str, Any]:
    """Every second site sees the 64 latest bytes; twice as many steps."""
    return bench_language(bench, "half-window-longer", everywhere(WINDOW, "odd"), train="all", lr=4e-4, transfer=0.2,
                          bfloat16=HALVES, steps=1200)  # fmt: skip


def all_linear(bench: Bench) -> dict[str, Any]:
    """Every site linear, the feature map that short trials find best; beside every site cut to 64 bytes, untrained."""
    trials = {name: trial(bench, name) for name in FEATURES if name != "identity"}
    best = min(trials, key=lambda name: trials[name])
    row = bench_language(bench, f"all-linear-{best}", everywhere({"linear": {"feature_map": best}}),
                         train="all", lr=1e-3, transfer=0.4, bfloat16=HALVES, steps=600)  # fmt: skip
    model = bench.language()
    cut = reattend.optimize(model, everywhere(WINDOW), calls(0), measure=False)
    return row | {"feature_map": best, "trials_kl": trials, "all_window_64_untrained": measured(cut, bench.context)}


def trial(bench: Bench, feature_map: str) -> float:
    """The held-out KL after a few steps."""
    fast = reattend.optimize(bench.language(), everywhere({"linear": {"feature_map": feature_map}}), calls(0),
                             measure=False)  # fmt: skip
    steps = max(2, (bench.steps or 400) // 10)
    found = reattend.recover(fast, calls, held_out=held_out(), train="all", lr=1e-3, steps=steps, transfer=0.5,
                             every=steps, folder=bench.out / f"trial-{feature_map}")  # fmt: skip
    return float(found.after["kl"])


def vit_agent(bench: Bench) -> dict[str, Any]:
    """Every site of the picture model agent attention."""
    from reattend.models.training.images import pictures
    from reattend.models.training.vision import accuracy

    def drawn(number: int) -> dict[str, Any]:
        return {"pixel_values": torch.from_numpy(pictures(11, number * 48, 48)[0])}

    def judge(model: Any) -> dict[str, float]:
        return {"accuracy": accuracy(model, 480)["accuracy"]}

    model = load_model("shapes_vit").model.float().eval()
    fast = reattend.optimize(model, everywhere({"agent": {"agent_num": 49}}), drawn(0), measure=False)

    def whole(one: Any) -> dict[str, float]:
        found = {"accuracy": accuracy(one)["accuracy"]}
        one.eval()
        return found

    before = {"original": whole(model.eval()), "rewritten": whole(fast)}
    held = [{"pixel_values": torch.from_numpy(pictures(12, k * 48, 48)[0])} for k in range(4)]
    return run(bench, "vit-agent", fast, drawn, held, judge, whole, before, train="all", lr=5e-4, transfer=0.4,
               bfloat16=HALVES, steps=800)  # fmt: skip


CASES: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "half-window": half_window,
    "half-window-longer": half_window_longer,
    "all-linear": all_linear,
    "vit-agent": vit_agent,
}


# --- how a row is made ------------------------------------------------------------------------------------------------


def bench_language(bench: Bench, name: str, recipe: Any, **how: Any) -> dict[str, Any]:
    model = bench.language()
    fast = reattend.optimize(model, recipe, calls(0), measure=False)

    def whole(one: Any) -> dict[str, float]:
        return measured(one, bench.context)

    before = {"original": whole(model), "rewritten": whole(fast)}
    judge = lambda one: judged(one, standard_library()[1], min(1024, bench.context))
    return run(bench, name, fast, calls, held_out(), judge, whole, before, **how)


def run(
    bench: Bench,
    name: str,
    fast: Any,
    data: Callable[[int], Any],
    held: list[Any],
    judge: Callable[[Any], Mapping[str, float]],
    whole: Callable[[Any], Mapping[str, float]],
    before: dict[str, Any],
    *,
    steps: int,
    **how: Any,
) -> dict[str, Any]:
    began = time.monotonic()
    steps = bench.steps or steps
    found = reattend.recover(fast, data, held_out=held, judge=judge, steps=steps, every=max(1, steps // 5),
                             folder=bench.out / name, **how)  # fmt: skip
    assert original(fast) is not fast
    return {
        **before, "recovered": dict(whole(fast)), "how": how, "steps": found.steps, "best_at": found.best_at,
        "train_seconds": round(found.seconds), "seconds_here": round(time.monotonic() - began),
        "threads": torch.get_num_threads(), "history": [dict(one) for one in found.history],
    }  # fmt: skip


def calls(number: int) -> dict[str, Any]:
    """Every third call is of two long rows, the others of eight short ones."""
    rows, _ = batch(ROWS["long" if number % 3 == 2 else "short"], standard_text(), number)
    return {"input_ids": rows, "use_cache": False}


def held_out() -> list[dict[str, Any]]:
    """Text that the original was not trained on either, at full length."""
    rows = torch.from_numpy(standard_library()[1].windows(2048, 8)).long()
    return [{"input_ids": row[None], "use_cache": False} for row in rows]


def measured(model: Any, context: int) -> dict[str, float]:
    """Bits per byte and recall, in eval()."""
    found = judged(model, standard_library()[1], context)
    model.eval()
    return found


_TEXT: list[Any] = []


def standard_text() -> Any:
    if not _TEXT:
        _TEXT.append(standard_library()[0])
    return _TEXT[0]


# --- the page ---------------------------------------------------------------------------------------------------------


def page(rows: Mapping[str, Any]) -> str:
    """Written by the script; nothing in it is typed by hand."""
    lines = [
        "# What recovery brings back",
        "",
        "Made by `python benchmarks/recovery.py`; all judgements and settings are in recovery.json. The original",
        "is the teacher of each row; judged on text or pictures that neither was trained on. Minutes are those of the",
        "clock: on a machine that others use they say little about the work.",
        "",
    ]
    for name, row in rows.items():
        kinds = [k for k in ("original", "rewritten", "recovered", "all_window_64_untrained") if k in row]
        measures = list(row["original"])
        lines += [f"## {name}", "", CASES[name].__doc__ or "", ""]
        lines += ["| | " + " | ".join(measures) + " |", "|---" * (len(measures) + 1) + "|"]
        for kind in kinds:
            lines.append(f"| {kind.replace('_', ' ')} | " + " | ".join(f"{row[kind][m]:.3f}" for m in measures) + " |")
        chosen = f"; feature map {row['feature_map']}" if "feature_map" in row else ""
        said = ", ".join(f"{k} {v}" for k, v in row["how"].items())
        lines += ["", f"{said}; {row['steps']} steps in {row['train_seconds'] / 60:.1f} min on {row['threads']} "
                  f"threads, best at step {row['best_at']}{chosen}.", "", verdict(name, row), ""]  # fmt: skip
    return "\n".join(lines)


def verdict(name: str, row: Mapping[str, Any]) -> str:
    if name.startswith("half-window"):
        lost = row["recovered"]["bpb"] - row["original"]["bpb"]
        return f"{'Within' if lost <= 0.15 else 'NOT within'} 0.15 bits per byte of the original: {lost:+.3f}."
    if name == "all-linear":
        gap = row["recovered"]["bpb"] - row["all_window_64_untrained"]["bpb"]
        return f"{'Better' if gap < 0 else 'NOT better'} than every site cut to window 64 without training: {gap:+.3f}."
    lost = row["original"]["accuracy"] - row["recovered"]["accuracy"]
    return f"{'Within' if lost <= 0.01 else 'NOT within'} 1 point of the original: {-100 * lost:+.2f}."


if __name__ == "__main__":
    main()
