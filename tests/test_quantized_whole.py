"""One recipe that swaps half the sites, gates heads, quantizes weights, keys and values: saved, loaded, generating."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from quality_models import byte_llama

import reattend
from reattend.compiler.quantized_linear import quantized_layers
from reattend.models.load import load_model

IDS = torch.randint(1, 250, (1, 12), generator=torch.Generator().manual_seed(0))
AGAIN = """
import sys, torch, reattend
fast = reattend.load(sys.argv[1])
ids = torch.load(sys.argv[1] + "/ids.pt")
found = fast.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
layers = found.past_key_values.layers
assert all(t.dtype == torch.uint8 for layer in layers for t in (layer.keys, layer.values))
print(found.sequences.tolist())
"""


def recipe(weights: Any, kv: str, half: str) -> dict[str, Any]:
    return {
        "version": 1,
        "sites": [
            {"match": {"layer": half}, "attention": {"window": {"window": 8, "sinks": 2}}},
            {"match": "*", "heads": {"moh": {"shared_heads": 2, "routed_heads": 1}}, "kv": kv},
        ],
        "quantize": {"lm_head": "keep", "*": weights},
        "verify": {"max_error": 2.0},
    }


def goes_round(model: Any, asked: dict[str, Any], layers: int, folder: Path) -> None:
    fast = reattend.optimize(model, asked, {"input_ids": IDS}, measure=False)
    rows = fast.report.rows
    assert all(row.status == "rewritten" for row in rows) and not fast.report.warnings
    assert ["window" in row.mechanism for row in rows].count(True) == len(rows) // 2
    assert all("moh" in row.mechanism and row.mechanism.startswith("int") for row in rows)
    assert len(quantized_layers(fast)) == layers and "lm_head" not in quantized_layers(fast)
    assert sum(p.numel() for p in model.parameters()) > 0 and not quantized_layers(model)
    found = fast.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0).tolist()
    fast.save_pretrained(folder)
    torch.save(IDS, folder / "ids.pt")
    done = subprocess.run([sys.executable, "-c", AGAIN, str(folder)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(found), done.stderr[-2000:]


def test_a_small_llama(tmp_path: Path) -> None:
    goes_round(byte_llama(), recipe("w8", "int4", "0"), 2 * 7, tmp_path)


@pytest.mark.slow
def test_the_shipped_byte_model(tmp_path: Path) -> None:
    goes_round(load_model("byte_lm").model, recipe({"w4a16": {"group_size": 64}}, "int8", "0-2"), 6 * 7, tmp_path)
