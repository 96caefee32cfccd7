"""Inputs at another batch and length: rows and tokens repeated or cut, everything else as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .refusal import Refused


def sized(
    args: Sequence[Any], kwargs: Mapping[str, Any], *, batch: int = 0, length: int = 0, dtype: torch.dtype | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with its leading sizes changed; 0 leaves one alone.

    >>> import torch
    >>> args, _ = sized((torch.tensor([[1, 2, 3]]),), {}, batch=2, length=5)
    >>> args[0]
    tensor([[1, 2, 3, 1, 2],
            [1, 2, 3, 1, 2]])
    """
    if batch < 0 or length < 0:
        raise Refused(f"batch {batch}, length {length}", where="inputs", fits="whole numbers; 0 leaves one as it is")
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    old = _length(tensors)
    if length and old is None:
        raise Refused(f"length {length} for inputs {[tuple(t.shape) for t in tensors]}", fits="inputs of tokens")

    def changed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if batch and value.ndim and value.shape[0] == tensors[0].shape[0]:
            value = _repeated(value, 0, batch)
        if length and value.ndim in (2, 3) and value.shape[1] == old:
            value = _repeated(value, 1, length)
        return value.to(dtype) if dtype is not None and value.is_floating_point() else value

    return tuple(map(changed, args)), {n: changed(v) for n, v in kwargs.items()}


def amount(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, str]:
    """How much one call works on: tokens, images, or calls where the inputs are neither."""
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    length = _length(tensors)
    if length is not None:
        return int(tensors[0].shape[0]) * length, "tokens"
    return (int(tensors[0].shape[0]), "images") if tensors and tensors[0].ndim == 4 else (1, "calls")


def _length(tensors: Sequence[Tensor]) -> int | None:
    """The number of tokens: the second size of ids (B, N) or of hidden states (B, N, D)."""
    return int(tensors[0].shape[1]) if tensors and tensors[0].ndim in (2, 3) else None


def _repeated(value: Tensor, dim: int, size: int) -> Tensor:
    index = torch.arange(size, device=value.device) % value.shape[dim]
    return value.index_select(dim, index)
