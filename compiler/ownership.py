"""A model's twin: new modules around the same memory, each tensor copied at the moment something would write to it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

_SHARED = "_reattend_shared"


def twin(model: nn.Module) -> nn.Module:
    """A copy of the module tree whose tensors share the memory of the originals; the original is never written to.

    Every parameter is a new one over the same memory, so that `.to`, `.grad` and `requires_grad_` stay with the twin.
    Memory is copied before weights are loaded, and when a parameter gets its first gradient.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values(), *_plain_tensors(module)):
            if tensor is not None and id(tensor) not in memo:
                memo[id(tensor)] = _shared(tensor)
    new = _copied(model, memo)
    for module in new.modules():
        if module._parameters or module._buffers:
            module.register_load_state_dict_pre_hook(_own_before_loading)
    return new


def own(tensor: Tensor) -> None:
    """Copy the memory that a tensor shares with the original."""
    if getattr(tensor, _SHARED, False):
        tensor.data = tensor.data.clone()
        setattr(tensor, _SHARED, False)


def own_all(model: nn.Module) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        own(tensor)


def _shared(tensor: Tensor) -> Tensor:
    if type(tensor) is nn.Parameter:
        new: Tensor = nn.Parameter(tensor.detach(), tensor.requires_grad)
        if new.requires_grad and new.is_leaf:
            new.register_post_accumulate_grad_hook(own)
    elif type(tensor) is Tensor:
        new = tensor.detach()
    else:
        return tensor  # quantized or otherwise special: such weights are not written in place
    setattr(new, _SHARED, True)
    return new


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


def _own_before_loading(module: nn.Module, *_: Any) -> None:
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None:
            own(tensor)
