"""Dropout of weights as a table: what it multiplies each weight with, drawn in the graph as the model drew it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .heads import Shaping
from .index_paths import same_size, shape_of
from .reading import Unreadable

aten = torch.ops.aten


def drawn(shaping: Shaping, like: Sequence[Any], p: Any, sources: Sequence[fx.Node]) -> fx.Node:
    """dropout(ones(like), p): 0 or 1 / (1 - p), from the same random numbers as dropout of weights of that shape."""
    ones = shaping.call(aten.new_ones.default, sources[0], [_size(shaping, size, sources) for size in like])
    return shaping.call(aten.dropout.default, ones, p, True)


def _size(shaping: Shaping, size: Any, sources: Sequence[fx.Node]) -> Any:
    if isinstance(size, int):
        return size
    for source in sources:
        for axis, own in enumerate(shape_of(source)):
            if same_size(own, size):
                return shaping.size(source, axis)
    raise Unreadable(f"dropout of weights whose size {size} is none of q, k, v")
