"""A transformers cache whose layers keep what later tokens can still reach: sinks, and a ring of the latest keys."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from .reach import Reach, kept_keys
from .refusal import Refused


class RingLayer(DynamicLayer):
    """The first `sinks` and the last `back` keys; `cumulative_length` counts all keys that ever came."""

    is_croppable = False
    is_ring = True

    def __init__(self, back: int, sinks: int) -> None:
        super().__init__()
        self.back, self.sinks, self.cumulative_length = back, sinks, 0

    @property
    def bound(self) -> Reach:
        return Reach(self.back, 0, self.sinks)

    @property
    def held(self) -> int:
        return int(self.keys.shape[-2]) if self.is_initialized and self.keys.numel() else 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What the new tokens see: the kept keys and their own; afterwards the layer holds what later ones can see."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self.cumulative_length += key_states.shape[-2]
        rows = kept_keys(keys.shape[-2], self.bound, keys.device)
        assert rows is not None  # a ring has a bound
        if len(rows) < keys.shape[-2]:
            self.keys, self.values = keys.index_select(-2, rows), values.index_select(-2, rows)
        return keys, values

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.held + query_length, self.cumulative_length - self.held

    def get_max_length(self) -> int:
        return self.bound.kept or 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise Refused("a ring cannot go back to keys that it dropped", where="crop", fits="DynamicCache()")

    def unrolled(self) -> DynamicLayer:
        """An ordinary layer of the same logical length: what the model is captured with."""
        layer = DynamicLayer()
        if self.held:
            sizes = (*self.keys.shape[:-2], self.cumulative_length, self.keys.shape[-1])
            values = (*self.values.shape[:-2], self.cumulative_length, self.values.shape[-1])
            layer.update(self.keys.new_zeros(sizes), self.values.new_zeros(values))
        return layer
