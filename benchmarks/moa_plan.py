"""MoA's headline on the shipped byte model: at the same average span, its plan recalls more than a uniform window.

    python benchmarks/moa_plan.py [--density 0.25] [--rows 8] [--md docs/moa.md]

The search profiles the influence of attention weights on passkey answers in text that the model was trained on, at 512
and 1,024 bytes; plans are judged on held-out text at 1,024 and at 2,048 bytes, which the search has not seen. The
uniform window has MoA's form, a sink block included, and the plan's average span at that length, rounded up.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

import reattend
from reattend.models.load import load_model
from reattend.models.training.recall import Sample, passkeys_at
from reattend.models.training.text import Text, standard_library
from reattend.passes.sparse.moa import MoA
from reattend.passes.sparse.moa_search import moa_search

BLOCK, PROFILED, JUDGED, DISTANCES = 32, (512, 1024), (1024, 2048), (64, 256, 448, 896, 1920)
OWN: dict[str, Any] = {"block_size": BLOCK, "min_span": BLOCK, "max_new_tokens": 0}


def samples(seed: int, text: Text, length: int, rows: int) -> list[Sample]:
    """Each row asks twice for a passkey of every distance that it is long enough for."""
    rng, distances = np.random.default_rng(seed), tuple(d for d in DISTANCES if d + 64 <= length)
    return [passkeys_at(rng, text, length, distances * 2) for _ in range(rows)]


def calibration(text: Text, length: int, rows: int) -> Iterator[dict[str, Any]]:
    """Calls whose loss is that of the answers alone."""
    for sample in samples(1, text, length, rows):
        ids = torch.from_numpy(sample.bytes.astype(np.int64))[None]
        labels = torch.full_like(ids, -100)
        for answer in sample.answers:
            span = slice(answer.start, answer.start + answer.length)
            labels[:, span] = ids[:, span]
        yield {"input_ids": ids, "labels": labels, "use_cache": False}


def spans(recipe: dict[str, Any], length: int) -> list[list[int]]:
    """By layer and key head, in bytes."""
    rules = [site["attention"]["moa"] for site in recipe["sites"]]
    own = [MoA(**{**rule, "alpha": tuple(rule["alpha"]), "beta": tuple(rule["beta"])}) for rule in rules]
    return [m.spans(len(m.alpha), length) for m in own]  # type: ignore[arg-type]


def uniform(span: float) -> dict[str, Any]:
    whole = -(-int(np.ceil(span)) // BLOCK) * BLOCK
    return {"version": 1, "sites": [{"match": "*", "attention": {"moa": {"alpha": whole, "beta": 0.0, **OWN}}}]}


def judged(model: Any, text: Text, length: int, rows: int) -> tuple[dict[int, float], float]:
    """The share of passkeys answered whole by distance, and bits per byte of text."""
    found: dict[int, list[bool]] = {}
    with torch.no_grad():
        for sample in samples(2, text, length, rows):
            ids = torch.from_numpy(sample.bytes.astype(np.int64))[None]
            guesses = model(input_ids=ids, use_cache=False).logits[0].argmax(-1).numpy()
            for a in sample.answers:
                right = guesses[a.start - 1 : a.start + a.length - 1] == sample.bytes[a.start : a.start + a.length]
                found.setdefault(a.distance, []).append(bool(right.all()))
        ids = torch.from_numpy(text.windows(length, rows).astype(np.int64))
        nats = [cross_entropy(model(input_ids=r[None], use_cache=False).logits[0, :-1], r[1:]).item() for r in ids]
    return {d: float(np.mean(r)) for d, r in sorted(found.items())}, float(np.mean(nats)) / log(2)


def rows_of(density: float, rows: int) -> Iterator[str]:
    model = load_model("byte_lm").model.float().eval()
    seen, held_out = standard_library()
    calls = {n: list(calibration(seen, n, rows)) for n in PROFILED}
    plan = moa_search(model, calls, lambda out: out.loss, densities=density, num_betas=9, alpha_interval=64,
                      rules_per_layer_limit=None, **OWN)  # fmt: skip
    example = {"input_ids": torch.zeros(1, 64, dtype=torch.long), "use_cache": False}
    fast = reattend.optimize(model, plan, example, measure=False)
    columns = " | ".join(f"passkey@{d}" for d in DISTANCES)
    yield f"| bytes | attention | average span | {columns} | bits per byte |"
    yield "|---" * (len(DISTANCES) + 4) + "|"
    for length in JUDGED:
        at = spans(plan, length)
        mean = float(np.mean(at))
        even = uniform(mean)
        flat = reattend.optimize(model, even, example, measure=False)
        told = {"full": (model, float(length)), "plan": (fast, mean),
                "uniform": (flat, float(even["sites"][0]["attention"]["moa"]["alpha"]))}  # fmt: skip
        for name, (m, span) in told.items():
            recall, bits = judged(m, held_out, length, rows)
            cells = " | ".join(f"{recall[d]:.2f}" if d in recall else "" for d in DISTANCES)
            yield f"| {length} | {name} | {span:.0f} | {cells} | {bits:.3f} |"
    yield ""
    yield f"Spans at {JUDGED[0]} bytes, by layer and key head:\n"
    for layer, own in enumerate(spans(plan, JUDGED[0])):
        yield f"- layer {layer}: {', '.join(map(str, own))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--md", type=Path, help="put the table behind the page's first rule")
    given = parser.parse_args()
    torch.manual_seed(0)
    lines = []
    for line in rows_of(given.density, given.rows):
        print(line, flush=True)
        lines.append(line)
    if given.md:
        head = given.md.read_text(encoding="utf-8").partition("\n---\n")[0]
        given.md.write_text(f"{head}\n---\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
