"""The first hour with a served model: a Llama whose layers see a window, generating with a cache that stops growing.

python examples/first_hour_llama.py [MODEL]        # a folder or hub name; without one, a small random Llama
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import reattend

RECIPE = {
    "version": 1,
    "sites": [{"match": {"kind": "causal-self"}, "attention": {"window": {"window": 32, "sinks": 4}}}],
}


def small() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, vocab_size=256, bos_token_id=1, eos_token_id=None))


def main(name: str = "") -> None:
    model = (AutoModelForCausalLM.from_pretrained(name) if name else small()).eval()
    ids = torch.randint(3, 200, (1, 64))

    fast = reattend.optimize(model, RECIPE, {"input_ids": ids})
    print(fast.report)

    cache = reattend.cache_for(fast)
    out = fast.generate(ids, past_key_values=cache, max_new_tokens=48, do_sample=False, pad_token_id=0)
    kept = cache.layers[0].keys.shape[2]
    print(
        f"\n{type(fast).__name__} generated {out.shape[1] - 64} tokens; of {out.shape[1]} its cache holds {kept} keys"
    )


if __name__ == "__main__":
    main(*sys.argv[1:2])
