"""One family of the zoo through capture and raising: how many sites, and how far apart the outputs are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..compiler.capture import capture
from ..compiler.raising import raise_sites
from ..compiler.signature import Call, forward_signature
from .zoo_family import Family


@dataclass(frozen=True)
class Row:
    family: str
    spelling: str
    sites: int
    raised: int
    difference: float
    notes: tuple[str, ...]  # why near misses were left alone


def raised_row(family: Family, spelling: str) -> Row:
    """Build, run, capture, raise, run again."""
    model = family.build(spelling).eval()
    args, kwargs = family.inputs()
    with torch.no_grad():
        wanted = tensors_in(model(*args, **kwargs))
        captured = capture(model, args, kwargs)
        raised = raise_sites(captured.graph)
        call = Call.of(forward_signature(model), args, kwargs)
        found = tensors_in(captured.result(call, captured.graph(*captured.inputs(call))))
    apart = [float((a.double() - b.double()).abs().max()) for a, b in zip(wanted, found, strict=True)]
    notes = tuple(sorted({miss.reason for miss in raised.misses}))
    return Row(family.name, spelling, family.sites, len(raised.nodes), max(apart), notes)


def tensors_in(output: Any) -> list[Tensor]:
    """The tensors of a model's output, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = tuple(output.values())
    if isinstance(output, tuple | list):
        return [t for part in output for t in tensors_in(part)]
    return []
