"""A model's twin: new modules around the same memory, each tensor copied at the moment something writes to it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def twin(model: nn.Module) -> nn.Module:
    """A copy of the module tree whose tensors share the memory of the originals; neither sees what the other writes.

    Every parameter is a new one, so that `.to`, `.grad` and `requires_grad_` stay with the twin. Memory is copied by
    torch itself when either side is first written, however that is done: an optimizer, `.data += x`, loading, numpy.
    Whatever asks for a writable address also makes that copy: `data_ptr()`, code that inductor generated.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values(), *_plain_tensors(module)):
            if tensor is not None and id(tensor) not in memo:
                memo[id(tensor)] = _shared(tensor)
    return _copied(model, memo)


def own(tensor: Tensor) -> None:
    """Copy the memory that a tensor still shares."""
    if type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and torch._C._is_cow_tensor(tensor):  # type: ignore[attr-defined]
        tensor.data_ptr()


def own_all(model: nn.Module) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        own(tensor)


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors lie at one address; asking for `data_ptr()` would part them."""
    return address(one) == address(other)


def address(tensor: Tensor) -> int:
    """Where a tensor lies, for comparison: `data_ptr()` would first make its memory its own."""
    return int(torch._C._data_address(tensor))  # type: ignore[attr-defined]


def lazy_copy(tensor: Tensor) -> Tensor | None:
    """Another tensor on the same memory, until either is written to; None of memory that torch did not allocate."""
    try:
        return torch._lazy_clone(tensor)
    except RuntimeError:
        return None


def _shared(tensor: Tensor) -> Tensor:
    if type(tensor) is nn.Parameter:
        return nn.Parameter(_in_common(tensor.detach()), tensor.requires_grad)
    if type(tensor) is Tensor:
        return _in_common(tensor.detach())
    return tensor  # quantized or otherwise special: such weights are not written in place


def _in_common(tensor: Tensor) -> Tensor:
    """What torch cannot copy on writing is copied at once: a mapped file, numpy's memory."""
    common = lazy_copy(tensor)
    return tensor.clone() if common is None else common


def _plain_tensors(module: nn.Module) -> Iterator[Tensor]:
    return (v for v in module.__dict__.values() if isinstance(v, Tensor))


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    try:
        return copy.deepcopy(model, dict(memo))
    except (TypeError, RuntimeError):
        return copy.deepcopy(model, memo | _uncopyable(model, memo))


def _uncopyable(model: nn.Module, memo: dict[int, Any]) -> dict[int, Any]:
    """Locks, files, generators and the like: the same objects in the twin."""
    everything = {id(m): m for m in model.modules()}
    found = {}
    for module in model.modules():
        for value in module.__dict__.values():
            if not isinstance(value, bool | int | float | str | Tensor | nn.Module):
                try:
                    copy.deepcopy(value, memo | everything)
                except (TypeError, RuntimeError):
                    found[id(value)] = value
    return found
