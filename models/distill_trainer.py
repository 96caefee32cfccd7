"""DistillTrainer: a transformers Trainer whose loss is the distance to the original; all else is the Trainer's."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from ..compiler.giving_way import ours
from ..compiler.hosted import host
from ..compiler.hosting import is_hosted, original
from ..compiler.recovery.losses import output_loss, own_loss
from ..compiler.recovery.pair import folded
from ..compiler.refusal import Refused
from .extras import needed

TRAINS = ("new", "all", None)


class Distilling:
    """What stands in front of transformers.Trainer: a teacher beside the model, and the loss."""

    accelerator: Any  # of the Trainer

    def __init__(
        self, model: Any = None, *arguments: Any, teacher: nn.Module | None = None, kl: float = 1.0,
        ce: float = 0.0, temperature: float = 1.0, train: str | None = None, **keywords: Any,
    ) -> None:  # fmt: skip
        student = _inside(model)
        _check(student, teacher, train)
        _choose(student, train)
        source: Any = original(student if teacher is None else teacher)
        super().__init__(model, *arguments, **keywords)  # type: ignore[call-arg]  # the Trainer behind it
        self.teacher: Any = host(source, folded).eval().requires_grad_(False)
        self.kl, self.ce, self.temperature = kl, ce, temperature
        self.model_accepts_loss_kwargs = False  # a mean over positions: the Trainer divides by accumulation steps
        self._teacher_ready = False

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**inputs)
        with torch.no_grad():
            expected = self._teacher()(**inputs)
        loss = self.kl * output_loss(outputs, expected, ((), inputs), temperature=self.temperature)
        if self.ce:
            loss = loss + self.ce * own_loss(outputs)
        student = _inside(self.accelerator.unwrap_model(model))
        if hasattr(student, "losses"):
            loss = loss + sum(ours(student, "losses")().values())
        return (loss, outputs) if return_outputs else loss

    def _teacher(self) -> Any:
        """Where the student is, and split over processes as it is."""
        if not self._teacher_ready:
            self.teacher = self.accelerator.prepare_model(self.teacher, evaluation_mode=True)
            self._teacher_ready = True
        return self.teacher


@functools.cache
def distill_trainer() -> type:
    """The class, made where transformers is there."""
    transformers = needed("transformers", "reattend[hf]")

    class DistillTrainer(Distilling, transformers.Trainer):  # type: ignore[name-defined]
        """transformers.Trainer for what optimize() gave: kl * KL(teacher, student) + ce * the model's own loss.

        teacher      left out: the weights that the model has now, under the original's attention (memory is shared
                     until a weight is written).
        kl, ce, temperature   the weights of both losses; ce needs labels.
        train        "new": only the tensors that the recipe added; "all"; None: as `requires_grad` says (peft).
        Everything else is transformers.Trainer's. Auxiliary losses of mechanisms are added.
        """

    return DistillTrainer


def _check(student: Any, teacher: nn.Module | None, train: str | None) -> None:
    if teacher is None and not is_hosted(student):
        fits = "teacher=the original, or a model that optimize() gave"
        raise Refused(f"a {type(student).__name__} without a teacher", where="DistillTrainer", fits=fits)
    if train not in TRAINS:
        raise Refused(f"train={train!r}", where="DistillTrainer", fits='"new", "all", or None with peft')


def _inside(model: Any) -> Any:
    """The model within a peft adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _choose(student: Any, train: str | None) -> None:
    if train is None:
        return
    new = dict(student.new_parameters()) if is_hosted(student) else {}
    if train == "new" and not new:
        found = "nothing to train: train=new, and the recipe added no tensors"
        raise Refused(found, where="DistillTrainer", fits='train="all", or peft\'s LoRA around the model')
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(train == "all" or name in new)
