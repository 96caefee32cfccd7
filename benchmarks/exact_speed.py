"""How fast the `exact` recipe leaves models: MiniLM, a small llama, a small ViT, eager or compiled.

    python benchmarks/exact_speed.py [--only minilm llama vit] [--compiled] [--runs 15] [--json FILE]

Numerics first, then interleaved pairs; the interval holds the median of the pairs' ratios with 95 % confidence.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch

import reattend
from reattend.models.load import load_model
from reattend.models.vision_ops import declare_missing_vision_ops

Case = tuple[Any, dict[str, Any]]


def minilm() -> Case:
    loaded = load_model("minilm")
    return loaded.model, dict(loaded.kwargs)


def minilm_padded() -> Case:
    """Four sentences of different lengths, padded to the longest."""
    model, kwargs = minilm()
    mask = torch.ones_like(kwargs["attention_mask"])
    for row, length in enumerate((128, 90, 60, 37)):
        mask[row, length:] = 0
    return model, kwargs | {"attention_mask": mask}


def minilm_short() -> Case:
    model, kwargs = minilm()
    return model, {name: value[:1, :16] for name, value in kwargs.items()}


def llama() -> Case:
    declare_missing_vision_ops()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=8,
                         num_key_value_heads=4, vocab_size=2000)  # fmt: skip
    return LlamaForCausalLM(config).eval(), {"input_ids": torch.randint(0, 2000, (1, 512)), "use_cache": False}


def vit() -> Case:
    declare_missing_vision_ops()
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=192, intermediate_size=768, num_hidden_layers=6, num_attention_heads=3,
                       image_size=224, patch_size=16)  # fmt: skip
    return ViTModel(config).eval(), {"pixel_values": torch.randn(2, 3, 224, 224)}


CASES: dict[str, Callable[[], Case]] = {
    "minilm": minilm,
    "minilm-padded": minilm_padded,
    "minilm-short": minilm_short,
    "llama": llama,
    "vit": vit,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--compiled", action="store_true", help="both sides through torch.compile")
    parser.add_argument("--runs", type=int, default=15, help="interleaved pairs at most")
    parser.add_argument("--json", help="write the figures here")
    chosen = parser.parse_args()
    rows = []
    for name in chosen.only:
        model, kwargs = CASES[name]()
        found = reattend.bench(model, "exact", kwargs, compiled=chosen.compiled, runs=chosen.runs, name=name)
        rows.append(found.to_dict())
        print(f"{name:<14} {found.how}: {found.verdict()}", flush=True)
    if chosen.json:
        with open(chosen.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
