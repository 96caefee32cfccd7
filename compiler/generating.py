"""generate() of a hosted model, with the caches that graphs take.

A cache of fixed size, which only spares a compiler work, becomes one that grows; where layers keep a state of another
kind than keys and values, or a model takes no cache, none is used.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .refusal import Refused, Uncapturable
from .signature import forward_signature

log = logging.getLogger("reattend")
CACHES = ("past_key_values", "cache_params", "state")  # what forwards call it
GROWING = ("dynamic", "dynamic_full", "offloaded", "quantized", "paged")


def generating(made_from: Any) -> Callable[..., Any]:
    """The class's own generate, its cache one of those that captured graphs take and give."""

    @functools.wraps(made_from.generate)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked = _asked(self, args, kwargs)
        if asked is not None and asked not in GROWING:
            log.warning("cache_implementation=%r: a DynamicCache instead, with the same tokens; graphs grow it", asked)
            kwargs = kwargs | {"cache_implementation": "dynamic"}
        if not any(name in forward_signature(self).parameters for name in CACHES):  # one would stay empty
            kwargs = kwargs | {"use_cache": False}
        state = _other_state(self) if kwargs.get("past_key_values") is None and kwargs.get("use_cache", True) else ""
        if state:
            log.warning("use_cache=False: graphs take no %s; the same tokens, each from all before it", state)
            kwargs = kwargs | {"use_cache": False}
        try:
            return made_from.generate(self, *args, **kwargs)
        except Uncapturable as refused:
            if kwargs.get("past_key_values") is not None or not kwargs.get("use_cache", True):
                raise
            fits = "generate(..., use_cache=False): its calls without a cache may be captured, if at every length anew"
            raise Refused(
                f"with its cache it cannot be captured: {refused.found}", where=refused.where, fits=fits
            ) from None

    return generate


def _other_state(model: Any) -> str:
    """The kind of cache layer that the model's own cache has beside those of keys and values, or ""."""
    from transformers import DynamicCache

    layers = DynamicCache(config=model.config).layers
    bases = ((type(layer).__name__, base.__name__) for layer in layers for base in type(layer).__mro__)
    return next((layer for layer, base in bases if base == "LinearAttentionCacheLayerMixin"), "")


def _asked(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """The kind of cache by name; a cache handed over is taken as it is, or refused by the call."""
    if kwargs.get("past_key_values") is not None:
        return None
    if kwargs.get("cache_implementation") is not None:
        return str(kwargs["cache_implementation"])
    config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or model.generation_config
    found = getattr(config, "cache_implementation", None)
    return None if found is None else str(found)
