"""What a row's numbers follow from, as one hash: weights and class, task, recipe, and the mechanisms' own sources."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...compiler.mechanism import mechanisms
from ...compiler.recipe import Choice, Recipe, Split
from .task import Task


def of_model(model: nn.Module) -> str:
    """Of the class, the config and every parameter and buffer."""
    found = hashlib.sha256(type(model).__qualname__.encode())
    found.update(json.dumps(_config(model), sort_keys=True, default=str).encode())
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor):
            found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def of_row(model: str, task: Task, recipe: Recipe | None, given: str = "") -> str:
    """Of a row: `given` is the fingerprint of a model that was handed over ready."""
    asked = "" if recipe is None else recipe.text()
    sources = (
        [] if recipe is None else [_source(slug) for slug in sorted({choice.mechanism for choice in choices(recipe)})]
    )
    facts = {"model": model, "task": task.name, "settings": dict(task.settings), "recipe": asked, "sources": sources,
             "given": given}  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]


def choices(recipe: Recipe) -> Iterator[Choice]:
    """Every mechanism that a recipe names, with its knobs."""
    wishes: list[Any] = [wish for rule in recipe.rules for _, wish in rule.decides]
    wishes += [*recipe.passes, *(choice for _, choice in recipe.quantize)]
    for wish in wishes:
        for choice in [one for _, one in wish.parts] if isinstance(wish, Split) else [wish]:
            if isinstance(choice, Choice):
                yield choice


def _source(slug: str) -> str:
    """The text of a mechanism's file, or of its class where that stands in a notebook."""
    cls = mechanisms()[slug]
    for place in (inspect.getmodule(cls), cls):
        with contextlib.suppress(OSError, TypeError):
            return inspect.getsource(place)  # type: ignore[arg-type]
    return f"{cls.__qualname__} {cls.knobs()}"


def _config(model: nn.Module) -> Any:
    """What a config says of the model, without where it came from."""
    config: Any = getattr(model, "config", None)
    plain = config.to_dict() if hasattr(config, "to_dict") else {}
    return {k: v for k, v in plain.items() if k not in ("transformers_version", "_name_or_path", "name_or_path")}
