"""Time of a token and bytes of a cache after 1k and 8k tokens, over states and over all keys, one model, one process.

python benchmarks/state_cache.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import reattend

SIZES: dict[str, Any] = dict(
    hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, vocab_size=1000
)


def bytes_of(cache: Any) -> int:
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


@torch.no_grad()
def after(fast: Any, cache: Any, tokens: int, steps: int = 15) -> tuple[float, int]:
    """Median milliseconds of a token behind that many, and what the cache holds."""
    ids = torch.randint(1, 1000, (1, tokens))
    fast(ids, past_key_values=cache, use_cache=True)
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        fast(ids[:, :1], past_key_values=cache, use_cache=True)
        times.append(time.perf_counter() - start)
    return 1e3 * median(times[3:]), bytes_of(cache)


def main() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=16384)).eval()
    recipe = {"version": 1, "sites": [{"match": "*", "attention": "linear"}]}
    fast = reattend.optimize(model, recipe, {"input_ids": torch.randint(1, 1000, (2, 16))}, measure=False)
    makers: tuple[tuple[str, Callable[[], Any]], ...] = (
        ("states", lambda: reattend.cache_for(fast)),
        ("all keys", lambda: DynamicCache(config=fast.config)),
    )
    for name, made in makers:
        after(fast, made(), 16)  # captured
        for tokens in (1024, 8192, 1024, 8192):
            spent, held = after(fast, made(), tokens)
            print(f"{name:<9} {tokens:>5} tokens: {spent:6.2f} ms a token, {held / 2**20:6.2f} MiB")


if __name__ == "__main__":
    main()
