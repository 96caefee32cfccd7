"""A tiny llama with a window, saved in a folder; to be run under another torch, for tests/test_saved_elsewhere.py.

python tests/saved_llama.py tests/saved/torch_2_11
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import reattend
from reattend.models.extras import needed

WINDOW = {"version": 1, "sites": [{"match": "*", "attention": {"window": {"window": 3, "sinks": 1}}}]}


def ids() -> torch.Tensor:
    return torch.arange(14).reshape(2, 7) % 11


def main(folder: Path) -> None:
    transformers = needed("transformers", "reattend[hf]")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=11, num_key_value_heads=2, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    fast = reattend.optimize(model, WINDOW, {"input_ids": ids()}, measure=False)
    fast.save_pretrained(folder)
    with torch.no_grad():
        logits = fast(input_ids=ids()).logits
    (folder / "expected.json").write_text(json.dumps({"torch": torch.__version__, "logits": logits.tolist()}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
