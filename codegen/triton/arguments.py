"""Tensors as a kernel's named arguments: a pointer, then the steps from one row to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

Arguments = dict[str, Any]


def port(name: str, t: Tensor) -> Arguments:
    """A (B, H, N, D) tensor."""
    return {name: t} | {f"{name}_{axis}": step for axis, step in zip("bhnd", t.stride(), strict=True)}


def index(name: str, t: Tensor) -> Arguments:
    """An index (M,), (B|1, M) or (B|1, H|1, M); one that is the same for all has a step of 0."""
    wide = t.reshape((1, 1, -1) if t.ndim == 1 else (t.shape[0], 1, -1) if t.ndim == 2 else t.shape)
    steps = [0 if size == 1 else step for size, step in zip(wide.shape, wide.stride(), strict=True)]
    return {name: wide} | {f"{name}_{axis}": step for axis, step in zip("bhn", steps, strict=True)}


def looked_up(number: int, t: Tensor) -> Arguments:
    """A table: sizes that indices are clamped to, steps."""
    found: Arguments = {f"t{number}": t}
    for axis, (size, step) in enumerate(zip(t.shape, t.stride(), strict=True)):
        found |= {f"t{number}_size{axis}": size, f"t{number}_step{axis}": step}
    return found


def kinds(tables: Sequence[Tensor]) -> str:
    """Of each table whether it holds floats or whole numbers, and its axes: "f1 i3"."""
    return " ".join(f"{'f' if t.is_floating_point() else 'i'}{t.ndim}" for t in tables)


def named(groups: Sequence[Sequence[Tensor]]) -> Mapping[str, Tensor]:
    return {f"t{n}": t for n, t in enumerate(groups[2])}
