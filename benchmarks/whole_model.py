"""Whole models after a recipe, beside themselves in eager mode and through torch.compile: docs/whole_model.{json,md}.

    python benchmarks/whole_model.py [--only language-window ...] [--dtype float32] [--runs 5] [--docs docs]

The byte model's shape at 8,192 tokens and a vision transformer of 64 x 64 patches, random weights. Pairs are
interleaved; what is said is the median of the ratios within pairs, and the interval that holds it with 95 % confidence.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import reattend
from reattend.compiler.bench import machine
from reattend.compiler.peak_memory import peak_bytes
from reattend.compiler.timing import Timing, timed
from reattend.models.training.language import byte_llama
from reattend.models.vision_ops import declare_missing_vision_ops

DOCS = Path(__file__).resolve().parent.parent / "docs"
Case = tuple[nn.Module, dict[str, Any]]
WINDOW: dict[str, Any] = {"window": {"window": 256, "sinks": 4}}


def language(tokens: int = 8192) -> Case:
    """The byte model's shape: 8,192 tokens of one row."""
    model = byte_llama().eval()
    return model, {"input_ids": torch.randint(0, 256, (1, tokens)), "use_cache": False, "logits_to_keep": 1}


def vision(side: int = 64) -> Case:
    """A vision transformer of 6 layers, 4 heads of 64, 64 x 64 patches and a class token."""
    declare_missing_vision_ops()
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
                       image_size=side * 4, patch_size=4)  # fmt: skip
    return ViTModel(config).eval(), {"pixel_values": torch.randn(1, 3, side * 4, side * 4)}


CASES: dict[str, tuple[Callable[[], Case], Any]] = {
    "language-exact": (language, "softmax"),
    "language-window": (language, WINDOW),
    "language-linear": (language, "linear"),
    "vision-agent": (vision, {"agent": {"agent_num": 49}}),
    "vision-linear": (vision, "linear"),
    "vision-neighborhood": (vision, {"neighborhood": {"kernel_size": 13}}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--runs", type=int, default=7, help="interleaved pairs at most")
    parser.add_argument("--seconds", type=float, default=40.0, help="of one comparison, about")
    parser.add_argument("--docs", type=Path, default=DOCS)
    given = parser.parse_args()
    kept = given.docs / "whole_model.json"
    rows: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    for name in given.only:
        row = measured(*CASES[name], getattr(torch, given.dtype), given.runs, given.seconds)
        rows[f"{name} {given.dtype}"] = row
        print(name, json.dumps(row), flush=True)
        kept.write_text(json.dumps(rows, indent=1) + "\n")
        (given.docs / "whole_model.md").write_text("\n".join(page(rows)) + "\n")


def measured(made: Callable[[], Case], attention: Any, dtype: torch.dtype, runs: int, seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    model, kwargs = made()
    model, kwargs = model.to(dtype), {k: v.to(dtype) if _real(v) else v for k, v in kwargs.items()}
    recipe = {"version": 1, "sites": [{"match": "*", "attention": attention}]}
    fast = reattend.optimize(model, recipe, kwargs, measure=False)

    def against(before: Any, after: Any) -> dict[str, Any]:
        found = timed(before, after, (), kwargs, runs=runs, seconds=seconds)
        assert found is not None
        return said(found)

    def peak(one: Any) -> int:
        with torch.no_grad():
            return peak_bytes(lambda: one(**kwargs), "cpu")

    compiled, fast_compiled = (torch.compile(one, dynamic=False) for one in (model, fast))
    return {
        "model": (made.__doc__ or "").strip(), "recipe": attention, "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "sites": len(fast.report.rows), "rewritten": sum(row.status == "rewritten" for row in fast.report.rows),
        "eager": against(model, fast), "compiled": against(compiled, fast),
        "both_compiled": against(compiled, fast_compiled), "peak_mb": [round(peak(one) / 1e6) for one in (model, fast)],
    }  # fmt: skip


def said(found: Timing) -> dict[str, Any]:
    low, high = found.interval
    return {"before_ms": round(found.before, 1), "after_ms": round(found.after, 1), "ratio": round(found.ratio, 2),
            "interval": [round(low, 2), round(high, 2)], "pairs": found.runs}  # fmt: skip


def _real(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


# --- the page ---------------------------------------------------------------------------------------------------------


def page(rows: Mapping[str, Any]) -> Iterator[str]:
    yield from (
        "# Whole models, before and after",
        "",
        "Made by `python benchmarks/whole_model.py`. How many times as fast the rewritten model is as the original:",
        "both in eager mode; the rewritten one, not compiled, beside torch.compile of the original; both compiled.",
        "In brackets what holds the median of interleaved pairs with 95 % confidence. Peak memory is of one call above",
        "weights and inputs. The recipes change what is computed, `exact` aside: quality is in quality.md.",
        "",
        "| model and recipe | sites | eager | beside compiled | both compiled | peak, MB |",
        "|---|---|---|---|---|---|",
    )
    for name, row in rows.items():
        yield (f"| {name} | {row['rewritten']} of {row['sites']} | {cell(row['eager'])} | {cell(row['compiled'])} | "
               f"{cell(row['both_compiled'])} | {row['peak_mb'][0]:,} -> {row['peak_mb'][1]:,} |")  # fmt: skip
    yield ""
    models = dict.fromkeys((row["model"], row["machine"], row["date"]) for row in rows.values())
    yield from (f"- {model} {where}; {date}." for model, where, date in models)


def cell(one: Mapping[str, Any]) -> str:
    low, high = one["interval"]
    return f"{one['ratio']:.2f} ({low:.2f} .. {high:.2f})"


if __name__ == "__main__":
    main()
