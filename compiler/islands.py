"""Where a model cannot be captured whole, its largest parts that can: found top-down, hosted in place."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .capture import Captured, capture
from .fidelity import against_model, too_far
from .hosted import host
from .hosting import ProgramFor
from .ownership import twin
from .refusal import Refused
from .signature import Call, forward_signature, rebuild
from .untouched import unchanged

Given = tuple[tuple[Any, ...], dict[str, Any]]
Lacking = Callable[[Captured], Sequence[str] | None]


@dataclass(frozen=True)
class Islands:
    """The parts wanted, by path, and what became of all others that were tried."""

    found: dict[str, Captured] = field(default_factory=dict)
    near: dict[str, tuple[str, ...]] = field(default_factory=dict)  # captured and not wanted: what comes near in them
    refused: dict[str, str] = field(default_factory=dict)  # not captured, and nothing in them is wanted: why

    @property
    def misses(self) -> tuple[str, ...]:
        """Near misses in parts that are not wanted, by their place in the whole."""
        return tuple(f"{path}.{said}" for path, every in self.near.items() for said in every)

    def left_out(self) -> tuple[str, ...]:
        """A line for each reason and the outermost parts that could not be captured for it."""
        alike: dict[str, list[str]] = {}
        for path, why in self.refused.items():
            if not any(path.startswith(f"{other}.") for other in self.refused if self.refused[other] == why):
                alike.setdefault(why, []).append(path)
        return tuple(f"left as it is: {_listed(paths)}: {why}" for why, paths in alike.items())


def _listed(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(paths[:3]) + more


def capture_islands(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None, lacking: Lacking
) -> Islands:
    """The wanted parts, none inside another, each captured on what it was given in one run of the whole.

    lacking   what comes near in a part that is not wanted; None where it is wanted.
    """
    calls = _calls(model, tuple(args), dict(kwargs or {}))
    found: dict[str, Captured] = {}
    refusals: dict[str, str] = {}
    near: dict[str, tuple[str, ...]] = {}
    known: dict[Hashable, str] = {}  # why parts were refused, "" where they are not wanted: their like need no trial
    first: dict[Hashable, str] = {}  # of parts alike the one that was tried
    waiting = [(name, child) for name, child in model.named_children()]
    while waiting:
        path, module = waiting.pop(0)
        if path in calls and any(True for _ in module.children()):
            alike = _alike(module, path, calls[path])
            refused = known.get(alike)
            if refused is None:
                refused = _tried(module, path, calls[path], lacking, found, near)
            else:
                near |= {path: near[first[alike]]} if first[alike] in near else {}
            if alike is not None and path not in found:
                known[alike] = refused
                first.setdefault(alike, path)
            if not refused:
                continue  # what is not wanted as a whole has nothing wanted inside
            refusals[path] = refused
        waiting[:0] = [(f"{path}.{name}", child) for name, child in module.named_children()]
    without = {p: why for p, why in refusals.items() if not any(f.startswith(f"{p}.") for f in found)}
    return Islands(found, near, without)


def _tried(
    module: nn.Module,
    path: str,
    given: Given,
    lacking: Lacking,
    found: dict[str, Captured],
    near: dict[str, tuple[str, ...]],
) -> str:
    """Capture a part: why that is refused; "" where it is not, and then it is found or not wanted."""
    try:
        captured = capture(module, *given)
    except Refused as refused:
        return refused.found
    apart = against_model(module, captured, Call.of(forward_signature(module), *given))
    if apart is not None and (said := too_far(apart, module)):
        return said  # what is inside may still be itself
    lacks = lacking(captured)
    if lacks is None:
        captured.notes = (*captured.notes, f"captured as an island at {path}")
        found[path] = captured
    elif lacks:
        near[path] = tuple(lacks)
    return ""


def _alike(module: nn.Module, path: str, given: Given) -> Hashable | None:
    """What two parts have in common that are captured, or not, alike: classes, settings, sizes, and their calls.

    A layer's number of its own is no setting.
    """
    try:
        call = Call.of(forward_signature(module), *given)
        place = next((int(part) for part in reversed(path.split(".")) if part.isdigit()), None)
        settings = tuple((name, type(m), _settings(m, place)) for name, m in module.named_modules())
        sizes = tuple(p.shape for p in module.parameters())
        alike = settings, sizes, call.layouts, tuple(t if t is None else t.shape for t in call.tensors)
        hash(alike)
    except (Refused, TypeError):
        return None
    return alike


def _settings(module: nn.Module, place: int | None) -> tuple[tuple[str, Any], ...]:
    plain = {n: v for n, v in vars(module).items() if isinstance(v, bool | int | float | str | type(None))}
    numbers = {n for n, v in plain.items() if v == place and ("layer" in n or n.endswith(("id", "idx", "index")))}
    return tuple((n, None if n in numbers else v) for n, v in plain.items())


def host_islands(
    model: nn.Module, paths: Sequence[str], program_for: Callable[[str], ProgramFor], *, limit: int = 8
) -> nn.Module:
    """A twin of the model in which the modules at these paths are hosted; `program_for(path)` makes their graphs."""
    whole = twin(model)
    for path in paths:
        whole.set_submodule(path, host(whole.get_submodule(path), program_for(path), limit=limit))
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
