"""Calls that quality is judged on: batches handed over in Python, or lines of a file named in the recipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .recipe import Recipe
from .refusal import Refused

Batch = tuple[tuple[Any, ...], dict[str, Any]]
SAMPLES = 32  # taken from a file where the recipe does not say how many


def as_batch(given: Any) -> Batch:
    """Positional and keyword arguments of what may be either, or a pair of both."""
    if isinstance(given, Mapping):
        return (), dict(given)
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], tuple) and isinstance(given[1], Mapping):
        return given[0], dict(given[1])
    return (tuple(given) if isinstance(given, tuple | list) else (given,)), {}


def held_out(recipe: Recipe, data: Iterable[Any] | None) -> tuple[tuple[Batch, ...], str]:
    """The batches, and how the report names them; none where neither the caller nor the recipe gives any."""
    if isinstance(data, str | bytes) or (data is not None and not isinstance(data, Iterable)):
        raise Refused(
            f"data {repr(data)[:40]}", where="optimize", fits="an iterable of calls; a file stands in the recipe"
        )
    if data is not None:
        batches = tuple(as_batch(batch) for batch in data)
        if not batches:
            raise Refused("data without a call", where="optimize", fits="calls like example_inputs, or no data at all")
        return batches, f"{len(batches)} batches given"
    if recipe.data.verify is None:
        return (), ""
    path = _beside(recipe, recipe.data.verify)
    if recipe.data.verify == recipe.data.calibrate:
        raise Refused(f"verify and calibrate are both {path}", where="data", fits="held-out data to verify on")
    count = recipe.data.samples or SAMPLES
    batches = calls_of(path, recipe.data.length, count)
    return batches, f"{len(batches)} samples of {path.name}"


def calibration(recipe: Recipe) -> tuple[Batch, ...]:
    """What the recipe names to learn from."""
    if recipe.data.calibrate is None:
        fits = "recover(fast, data), --data FILE, or `data: {calibrate: FILE}` in the recipe"
        raise Refused("no data", where="recover", fits=fits)
    return calls_of(_beside(recipe, recipe.data.calibrate), recipe.data.length, recipe.data.samples)


def calls_of(path: Path, length: int | None = None, count: int | None = None) -> tuple[Batch, ...]:
    """The calls of a file, one a line."""
    found = tuple(_lines(path, length, count or sys.maxsize))
    if not found:
        raise Refused(f"{path} is empty", where="data", fits='lines like {"input_ids": [1, 2, 3]}')
    return found


def _beside(recipe: Recipe, name: str) -> Path:
    """A file that a recipe names is looked for beside the recipe."""
    path = Path(name)
    if not path.is_absolute() and Path(recipe.source).suffix in (".yaml", ".yml", ".json"):
        return Path(recipe.source).parent / path
    return path


def _lines(path: Path, length: int | None, count: int) -> Iterator[Batch]:
    """One call a line: {"argument": nested list of numbers}, without the batch axis."""
    if not path.exists():
        raise Refused(f"{path} does not exist", where="data")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if number > count:
                return
            try:
                found = json.loads(line)
                values = {name: _tensor(value, length) for name, value in found.items()}
            except (ValueError, TypeError, AttributeError) as error:
                fits = 'one call a line, as {"input_ids": [1, 2, 3]}; text has to be tokenized first'
                raise Refused(f"{path}:{number}: {error}", where="data", fits=fits) from None
            yield (), values


def _tensor(value: Any, length: int | None) -> Any:
    if not isinstance(value, list):
        return value
    return torch.tensor(value[:length]).unsqueeze(0)
