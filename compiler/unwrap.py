"""The model inside what people hand over, compiled or distributed; or why it cannot be taken as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .refusal import Refused

_WRAPPERS = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}
_QUANTIZED_WEIGHTS = ("Params4bit", "Int8Params")


def unwrap(model: Any) -> tuple[nn.Module, tuple[str, ...]]:
    """The plain module, and a note for every wrapper that was taken off."""
    notes: list[str] = []
    while type(model).__name__ in _WRAPPERS:
        notes.append(f"{type(model).__name__} was taken off; wrap the result again")
        model = getattr(model, _WRAPPERS[type(model).__name__])
    if not isinstance(model, nn.Module):
        raise Refused(f"a {type(model).__name__}", where="optimize", fits=_parts_of(model))
    _refuse_strangers(model)
    if model._compiled_call_impl is not None:
        notes.append("model.compile() was taken off; compile the result again")
        model = _without_compiled_call(model)
    inside = [name for name, module in model.named_modules() if name and _is_compiled(module)]
    if inside:
        more = f" and {len(inside) - 1} more" if len(inside) > 1 else ""
        notes.append(f"compiled inside ({inside[0]}{more}): what stands behind it was captured")
    return model, tuple(notes)


def name_of(model: nn.Module) -> str:
    """What reports call a model where the caller does not say."""
    return getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__


def _without_compiled_call(model: nn.Module) -> nn.Module:
    """The same model over the same modules and tensors, called without what model.compile() put before its forward."""
    view: nn.Module = object.__new__(type(model))
    view.__dict__ = {name: value for name, value in model.__dict__.items() if name != "_compiled_call_impl"}
    return view


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None


def _parts_of(thing: Any) -> str:
    """For a pipeline: which of its parts are models."""
    inside = getattr(thing, "components", None) or getattr(thing, "__dict__", {})
    parts = [name for name, part in dict(inside).items() if isinstance(part, nn.Module)]
    if parts:
        shown = ", ".join(f"optimize(pipeline.{name})" for name in parts)
        return f"a torch.nn.Module; this one has such parts: {shown}"
    return "a torch.nn.Module"


def _refuse_strangers(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise Refused("a scripted or traced module", where="optimize", fits="the torch.nn.Module that it was made from")
    if type(model).__name__.startswith("Peft") and hasattr(model, "base_model"):
        fits = "optimize the base model first and add the adapter to the result, or merge_and_unload()"
        raise Refused(type(model).__name__, where="optimize", fits=fits)
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            fits = "load without device_map; optimize() captures one device"
            raise Refused("a device_map hook", where=name or type(model).__name__, fits=fits)
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ in _QUANTIZED_WEIGHTS:
            fits = "load in float or bfloat16; quantize by the recipe or by torchao after optimize()"
            raise Refused(f"bitsandbytes weights ({type(parameter).__name__})", where=name, fits=fits)
