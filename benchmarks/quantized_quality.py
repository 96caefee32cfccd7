"""What fewer bits cost: bits per byte of the shipped byte model, cosine of MiniLM's embeddings, recipe by recipe.

    python benchmarks/quantized_quality.py [--only byte_lm minilm] [--json FILE]

Calibrated on text that the byte model was trained on, judged on text that was held out; the same rows for every recipe.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import reattend
from reattend.models.load import load_model
from reattend.models.quality.sentences import embedded, read
from reattend.models.training.text import Text, standard_library
from reattend.models.vision_ops import declare_missing_vision_ops

LENGTH, ROWS, CALIBRATED = 512, 16, 8
SMOOTH: list[Any] = ["smooth_attention"]
QOQ: list[Any] = [{"rotate": {"values": True}}, "reorder", "smooth_attention", "smooth_proj"]
STILL: list[Any] = QOQ[1:]
HEADS: list[Any] = [{"rotate": {"stream": False, "values": True}}, "reorder"]  # what BERT's norms allow


def asked(weights: Any = None, passes: list[Any] | None = None, kv: str = "", head: str = "lm_head") -> dict[str, Any]:
    found: dict[str, Any] = {"version": 1, "sites": [{"match": "*", "kv": kv or "keep"}], "passes": passes or []}
    return found | ({"quantize": {head: "keep", "*": weights}} if weights else {})


def four(size: int, scheme: str = "qserve", rounding: str = "nearest") -> dict[str, Any]:
    return {scheme: {"group_size": size, "rounding": rounding}}


# name, bits of weights, activations, keys and values; rows of equal bits stand together
BYTE_LM: dict[str, tuple[str, dict[str, Any]]] = {
    "qserve, groups of 64, to nearest": ("4 8 16", asked(four(64))),
    "qserve, groups of 64, QoQ without rotation": ("4 8 16", asked(four(64, rounding="gptq"), STILL)),
    "qserve, groups of 64, QoQ": ("4 8 16", asked(four(64, rounding="gptq"), QOQ)),
    "qserve, an output a group, to nearest": ("4 8 16", asked(four(-1))),
    "qserve, an output a group, QoQ": ("4 8 16", asked(four(-1, rounding="gptq"), QOQ)),
    "int4 keys and values": ("16 16 4", asked(kv="int4")),
    "int4 keys and values, smooth_attention": ("16 16 4", asked(passes=SMOOTH, kv="int4")),
    "all of it, an output a group, to nearest": ("4 8 4", asked(four(-1), kv="int4")),
    "all of it, an output a group, QoQ": ("4 8 4", asked(four(-1, rounding="gptq"), QOQ, "int4")),
    "w8": ("8 16 16", asked("w8")),
    "w8a8": ("8 8 16", asked("w8a8")),
    "w4a16, groups of 64": ("4 16 16", asked(four(64, "w4a16"))),
    "int8 keys and values": ("16 16 8", asked(kv="int8")),
}
MINILM: dict[str, tuple[str, dict[str, Any]]] = {
    "qserve, groups of 128, to nearest": ("4 8", asked(four(128), head="pooler.*")),
    "qserve, groups of 128, QoQ": ("4 8", asked(four(128, rounding="gptq"), HEADS, head="pooler.*")),
    "w8": ("8 16", asked("w8", head="pooler.*")),
    "w8a8": ("8 8", asked("w8a8", head="pooler.*")),
    "w4a16, groups of 128": ("4 16", asked(four(128, "w4a16"), head="pooler.*")),
}


def byte_lm() -> dict[str, float]:
    """Bits per byte of the original and of each recipe."""
    loaded, (train, held) = load_model("byte_lm"), standard_library()
    known, rows = windows(train, CALIBRATED), windows(held, ROWS)
    found = {"as it came": bits(loaded.model, rows)}
    for name, (_, recipe) in BYTE_LM.items():
        fast = reattend.optimize(loaded.model, recipe, {"input_ids": known, "use_cache": False}, measure=False)
        found[name] = bits(fast, rows)
        print(f"byte_lm  {name:42} {found[name]:.4f}", flush=True)
    return found


def windows(text: Text, count: int) -> Tensor:
    return torch.from_numpy(text.windows(LENGTH, count).astype("int64"))


def bits(model: Any, rows: Tensor) -> float:
    total = 0.0
    with torch.no_grad():
        for part in rows.split(4):
            logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
            total += float(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
    return total / math.log(2) / rows[:, 1:].numel()


def minilm() -> dict[str, float]:
    """Mean cosine with the original's embeddings."""
    loaded = load_model("minilm")
    from transformers import AutoTokenizer

    from reattend.models.load import minilm_folder

    tokenizer = AutoTokenizer.from_pretrained(str(minilm_folder()))
    call = dict(tokenizer(read()[0], padding=True, return_tensors="pt"))
    call = {n: call[n] for n in ("input_ids", "attention_mask")}
    known = {n: t[::2] for n, t in call.items()}
    before = embeddings(loaded.model, call)
    found = {"as it came": 1.0}
    for name, (_, recipe) in MINILM.items():
        fast = reattend.optimize(loaded.model, recipe, known, measure=False)
        found[name] = float((embeddings(fast, call) * before).sum(-1).mean())
        print(f"minilm   {name:42} {found[name]:.5f}", flush=True)
    return found


def embeddings(model: Any, call: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return embedded(model(**call).last_hidden_state, call["attention_mask"])


def table(title: str, measure: str, rows: dict[str, tuple[str, Any]], found: dict[str, float], digits: int) -> str:
    lines = [f"| {title} | bits of weights, activations, keys and values | {measure} |", "|---|---|---|"]
    for name, value in found.items():
        lines.append(f"| {name} | {rows[name][0] if name in rows else ''} | {value:.{digits}f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=["byte_lm", "minilm"])
    parser.add_argument("--json")
    given = parser.parse_args()
    declare_missing_vision_ops()
    found: dict[str, dict[str, float]] = {}
    if "byte_lm" in given.only:
        found["byte_lm"] = byte_lm()
        print(table("byte_lm", "bits per byte", BYTE_LM, found["byte_lm"], 4))
    if "minilm" in given.only:
        found["minilm"] = minilm()
        print(table("MiniLM", "cosine", MINILM, found["minilm"], 5))
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
