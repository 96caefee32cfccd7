"""Where a model cannot be captured whole, its largest parts that can: found top-down, hosted in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .capture import Captured, capture
from .hosted import ProgramFor, host
from .ownership import twin
from .refusal import Refused
from .signature import Call, forward_signature, rebuild
from .untouched import unchanged

Given = tuple[tuple[Any, ...], dict[str, Any]]


def capture_islands(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    wanted: Callable[[Captured], bool],
) -> dict[str, Captured]:
    """The wanted parts by path, none inside another, each captured on what it was given in one run of the whole."""
    calls = _calls(model, tuple(args), dict(kwargs or {}))
    found: dict[str, Captured] = {}
    refusals: dict[str, Refused] = {}
    waiting = [(name, child) for name, child in model.named_children()]
    while waiting:
        path, module = waiting.pop(0)
        if path in calls and any(True for _ in module.children()):
            try:
                captured = capture(module, *calls[path])
            except Refused as refused:
                refusals[path] = refused
            else:
                if wanted(captured):
                    captured.notes = (*captured.notes, f"captured as an island at {path}")
                    found[path] = captured
                continue  # what is not wanted as a whole has nothing wanted inside
        waiting[:0] = [(f"{path}.{name}", child) for name, child in module.named_children()]
    if not found:
        said = "; ".join(f"{path}: {refused.found}" for path, refused in list(refusals.items())[:3])
        raise Refused("no part of it can be captured", where=type(model).__name__, fits=said or "a part with attention")
    return found


def host_islands(model: nn.Module, paths: Sequence[str], program_for: Callable[[str], ProgramFor]) -> nn.Module:
    """A twin of the model in which the modules at these paths are hosted; `program_for(path)` makes their graphs."""
    whole = twin(model)
    for path in paths:
        whole.set_submodule(path, host(whole.get_submodule(path), program_for(path)))
    return whole


def _calls(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Given]:
    """What every submodule is given at its first call, from one run."""
    paths = {module: path for path, module in model.named_modules() if path}
    calls: dict[str, Given] = {}

    def remember(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if paths[module] not in calls:
            calls[paths[module]] = _kept(module, given, named)

    handles = [m.register_forward_pre_hook(remember, with_kwargs=True) for m in paths]
    try:
        with torch.no_grad(), unchanged(model), torch.random.fork_rng(devices=[]):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _kept(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    """The call as it is now: its containers, such as caches, are made again, because the run goes on to change them."""
    try:
        call = Call.of(forward_signature(module), args, kwargs)
        if any(t is None for t in call.tensors):
            return args, kwargs
        _, again, named = rebuild(call.signature, call.layouts, call.tensors)
    except Refused:
        return args, kwargs
    return again, named
