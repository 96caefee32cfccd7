"""A task: calls of a model, what each answer is worth, and everything that decides the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...compiler.held_out import Batch
from ...compiler.refusal import Refused
from ...compiler.signature import Call, forward_signature
from ...compiler.verification import compare

Tally = dict[str, tuple[float, float]]  # measure -> (sum, count): the mean over all calls is what is reported
Judge = Callable[[int, Tensor, Tensor | None], Tally]  # the number of the call, the answer, the original's answer


@dataclass(frozen=True)
class Measure:
    """One number of a row."""

    name: str
    says: str
    up: bool  # more is better
    worst: float  # where knowing nothing ends: a plot goes no further
    form: str = ".3f"


@dataclass(frozen=True)
class Part:
    """Some calls that are judged the same way."""

    calls: tuple[Batch, ...]
    judge: Judge
    against: bool = False  # whether the judge wants the original's answers


@dataclass(frozen=True)
class Task:
    """`settings` decide the numbers and are hashed; `make` builds the calls when the first row needs them."""

    name: str
    measures: tuple[Measure, ...]  # the first is the one that is plotted
    settings: Mapping[str, Any]
    make: Callable[[], tuple[Part, ...]] = field(compare=False, repr=False)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        return self.make()

    @property
    def calls(self) -> int:
        return sum(len(part.calls) for part in self.parts)

    @property
    def example(self) -> Batch:
        """The call that a recipe is applied to, and that is timed."""
        return self.parts[0].calls[0]


class Original:
    """The model that rows are compared with; what it answered where that is asked again is kept."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._kept: dict[tuple[int, int], Tensor] = {}

    def answer(self, task: str, part: int, number: int, call: Batch) -> Tensor:
        """Refused where the model itself does not run on the call."""
        if (part, number) not in self._kept:
            try:
                self._kept[part, number] = answer_of(self.model, call)
            except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as fault:
                said = f"{type(fault).__name__}: {str(fault).strip().partition(chr(10))[0]}"
                where = f"{type(self.model).__name__} on {task}[{number}]"
                raise Refused(said, where=where, fits="calls that the model runs on") from None
        return self._kept[part, number]


def judged(task: Task, model: nn.Module, original: Original, tick: Callable[[], Any]) -> dict[str, float]:
    """Every measure of a model, in the task's order; `tick` is called after every call."""
    sums: dict[str, list[tuple[float, float]]] = {measure.name: [] for measure in task.measures}
    for place, part in enumerate(task.parts):
        for number, call in enumerate(part.calls):
            before = original.answer(task.name, place, number, call) if part.against else None
            got = before if before is not None and model is original.model else answer_of(model, call)
            for name, pair in part.judge(number, got, before).items():
                sums[name].append(pair)
            tick()
    return {name: _mean(pairs) for name, pairs in sums.items()}


def answer_of(model: nn.Module, call: Batch) -> Tensor:
    """What a model is about: the first floating tensor that it gives (logits, the last hidden state)."""
    with torch.no_grad():
        given = model(*call[0], **call[1])
    for leaf in pytree.tree_leaves(given):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 0:
            return leaf
    raise Refused("no tensor of numbers comes out", where=type(model).__name__, fits="logits or hidden states")


def must_fit(task: Task, model: nn.Module) -> None:
    """Refuses calls that the model's forward does not take."""
    signature = forward_signature(model)
    for part in task.parts:
        for number, (args, kwargs) in enumerate(part.calls):
            try:
                Call.of(signature, args, kwargs)
            except Refused as refused:
                raise refused.at(f"{type(model).__name__} on {task.name}[{number}]") from None


def agreement(got: Tensor, original: Tensor) -> Tally:
    """KL and equal first choices of two sets of logits, each place counting once."""
    found, places = compare(got, original), float(original[..., 0].numel())
    if found.top1 is None or found.kl is None:
        return {}
    return {"kl": (found.kl * places, places), "top1": (found.top1 * places, places)}


def _mean(pairs: list[tuple[float, float]]) -> float:
    count = sum(count for _, count in pairs)
    return sum(value for value, _ in pairs) / count if count else math.nan


KL = Measure("kl", "KL divergence from the original, nats", False, 5.0, ".4f")
TOP1 = Measure("top1", "share of first choices equal to the original's", True, 0.0)
