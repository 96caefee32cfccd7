"""A transformers cache layer that keeps the state of a causal scan in place of keys and values: it does not grow."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from .grown import like_rows
from .refusal import Refused


class StateLayer(DynamicLayer):
    """`keys` is the state (B, H, D, Dv), `values` what it was told of padding (B, 2); both are made by the graph.

    `cumulative_length` counts all keys that ever came; `stands_for` is what the keys and the values would be: heads,
    dimension and type.
    """

    is_croppable = False
    is_state = True

    def __init__(self) -> None:
        super().__init__()
        self.cumulative_length = 0
        self.stands_for: tuple[tuple[int, int, str], ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise Refused("a state, which only a rewritten graph adds keys to", where="update", fits="DynamicCache()")

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise Refused("a state cannot go back: keys are summed in it", where="crop", fits="DynamicCache()")

    def unrolled(self) -> DynamicLayer:
        """An ordinary layer of the same logical length: what the model is captured with."""
        layer = DynamicLayer()
        if self.is_initialized:
            keys, values = (like_rows(self.keys, self.cumulative_length, of) for of in self.stands_for)
            layer.update(keys, values)
        return layer
