"""The transformers cache that an optimized model decodes with: for each layer what its attention says is enough."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from .hosting import about
from .keeping import Ring
from .refusal import Refused
from .ring_cache import RingLayer
from .state_cache import StateLayer


def cache_for(fast: nn.Module) -> DynamicCache:
    """An empty cache for `fast.generate(past_key_values=...)`.

    A ring where the keys in reach are bounded, a state where the rewritten site is one scan, else ordinary rows.
    """
    work = about(fast)
    if work is None or (kept := work.keeps) is None:
        fits = "optimize(model, ...), or what it gave as reattend.load reads it"
        raise Refused(f"a {type(fast).__name__} that was not optimized", where="cache_for", fits=fits)
    config: Any = fast.config
    cache = DynamicCache()
    cache.layers = [
        _layer(kept.get(number)) for number in range(config.get_text_config(decoder=True).num_hidden_layers)
    ]
    return cache


def _layer(keeps: Any) -> DynamicLayer:
    if keeps is None:
        return DynamicLayer()
    return RingLayer(keeps.back, keeps.sinks) if isinstance(keeps, Ring) else StateLayer()


def held_bytes(cache: Any) -> int:
    """The memory of a cache's keys and values, or of what it keeps in their place."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if isinstance(t, torch.Tensor)]
    return sum(t.untyped_storage().nbytes() for t in tensors)
