"""Row by row: optimize, judge, predict and time; what a file holds already is not measured again."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ...compiler.bench import machine
from ...compiler.hosting import about, is_hosted
from ...compiler.mechanism import KINDS, mechanism, mechanisms
from ...compiler.recipe import Choice, Recipe
from ...compiler.refusal import Refused
from ...compiler.timing import Timing, timed
from .fingerprint import choices, of_model, of_row
from .row import FAILED, MEASURED, ORIGINAL, REFUSED, Record, Row
from .table import Quality, file_name
from .task import Original, Task, judged, must_fit
from .wish import Wish

RUNS, SECONDS = 9, 3.0  # of timing a row
DIGITS = 6  # kept of a measure: beyond, sums depend on the number of threads
Optimize = Callable[[Recipe, Any], nn.Module]

log = logging.getLogger("reattend")


def judge_rows(
    name: str,
    model: nn.Module,
    task: Task,
    wishes: Sequence[Wish],
    optimize: Optimize,
    *,
    out: Path | None = None,
    progress: bool | None = None,
) -> Quality:
    """The original's row, then one a wish; with `out` they are kept in a file of the model's name and taken from it."""
    record = Record(None if out is None else out / f"{file_name(name)}.jsonl")
    weights = of_model(model)
    asked = [Wish(ORIGINAL, model=model), *wishes]
    keys = [of_row(weights, task, wish.recipe, _given(wish)) for wish in asked]
    known = {key: row for key in keys if (row := record.find(key)) is not None}
    left = sum(key not in known for key in keys)
    rows = []
    if left:
        must_fit(task, model)
    bench = _Bench(model, task, optimize)
    with tqdm(total=left * task.calls if left else 0, unit="call", disable=_quiet(progress)) as bar:
        for wish, key in zip(asked, keys, strict=True):
            row = known.get(key) or bench.row(wish, key, bar)
            if key not in known:
                record.add(row)
            rows.append(row)
    record.tidy(rows)
    return Quality(name, task.name, task.measures, task.settings, tuple(rows))


def _quiet(progress: bool | None) -> bool | None:
    """None: a bar on a terminal, and none elsewhere."""
    return None if progress is None else not progress


def _given(wish: Wish) -> str:
    """The fingerprint of a model that was handed over, its graph's recipes with it."""
    if wish.model is None or wish.name == ORIGINAL:
        return ""
    recipes = about(wish.model).recipes if is_hosted(wish.model) else ()
    return of_model(wish.model) + "".join(recipe.digest for recipe in recipes)


class _Bench:
    """One model on one task; holds the original's answers between rows."""

    def __init__(self, model: nn.Module, task: Task, optimize: Optimize) -> None:
        self.task, self.optimize, self.original = task, optimize, Original(model)

    def row(self, wish: Wish, key: str, bar: Any) -> Row:
        """Measured, or refused with the reason; a mechanism that breaks down breaks its own row alone."""
        bar.set_description(wish.name[:32])
        started = bar.n
        recipe = wish.recipe.text() if wish.recipe else ""
        try:
            if wish.refused:
                raise Refused(wish.refused)
            return self._measured(wish, key, recipe, bar)
        except Refused as refused:
            if wish.name == ORIGINAL:
                raise
            return Row(wish.name, key, recipe, REFUSED, str(refused), kind=_asked_kind(wish.recipe))
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as fault:
            if wish.name == ORIGINAL:
                raise
            log.exception("%s broke down", wish.name)
            return Row(wish.name, key, recipe, FAILED, _first_line(fault), kind=_asked_kind(wish.recipe))
        finally:
            bar.update(started + self.task.calls - bar.n)

    def _measured(self, wish: Wish, key: str, recipe: str, bar: Any) -> Row:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            fast = wish.model if wish.recipe is None else self.optimize(wish.recipe, self.task.example)
            assert fast is not None
            if fast.training:
                raise Refused(
                    "a model in train()", where=wish.name, fits="model.eval(): dropout makes every call another"
                )
            _refuse_unchanged(wish, fast)
            found = judged(self.task, fast, self.original, bar.update)
        broken = [name for name, value in found.items() if not math.isfinite(value)]
        kind, sites = _kind(wish, fast), _sites(fast)
        if broken:
            reason = f"no finite {', '.join(broken)}"
            return Row(wish.name, key, recipe, FAILED, reason, kind, sites=sites)
        predicted = getattr(getattr(fast, "report", None), "predicted", None)
        timing = None if fast is self.original.model else self._timed(fast)
        return Row(
            wish.name,
            key,
            recipe,
            MEASURED,
            kind=kind,
            untrained=kind == KINDS[-1] and wish.recipe is not None,
            sites=sites,
            measures={name: float(f"{value:.{DIGITS}g}") for name, value in found.items()},
            flops=(predicted[0].flops, predicted[1].flops) if predicted else None,
            bytes=(predicted[0].bytes, predicted[1].bytes) if predicted else None,
            time=(round(timing.before, 3), round(timing.after, 3)) if timing else None,
            ratio=round(timing.ratio, 3) if timing else None,
            interval=_interval(timing) if timing else None,
            machine=machine(),
        )

    def _timed(self, fast: nn.Module) -> Timing | None:
        args, kwargs = self.task.example
        return timed(self.original.model, fast, args, kwargs, runs=RUNS, seconds=SECONDS)


def _interval(timing: Timing) -> tuple[float, float] | None:
    low, high = timing.interval
    return (round(low, 3), round(high, 3)) if math.isfinite(high) else None


def _sites(fast: nn.Module) -> tuple[int, int]:
    rows = getattr(getattr(fast, "report", None), "rows", ())
    return sum(row.status == "rewritten" for row in rows), len(rows)


def _refuse_unchanged(wish: Wish, fast: nn.Module) -> None:
    """A recipe that asks for sites and gets none measures the original: that is no row of its own."""
    rows = getattr(getattr(fast, "report", None), "rows", ())
    asked = wish.recipe is not None and not _of_the_whole(wish.recipe)
    if asked and rows and all(row.status != "rewritten" for row in rows):
        patterns = ", ".join(dict.fromkeys(row.site.pattern for row in rows))
        reason = next((row.reason for row in rows if row.reason), f"no rule matches a site here ({patterns})")
        raise Refused(reason, where=wish.name)


def _kind(wish: Wish, fast: nn.Module) -> str:
    """The farthest from the original of what stands in the model."""
    report = getattr(fast, "report", None)
    kinds = {row.kind for row in getattr(report, "rows", ()) if row.status == "rewritten"}
    return _farthest(kinds | {_kind_of(choice) for choice in (_of_the_whole(wish.recipe) if wish.recipe else ())})


def _of_the_whole(recipe: Recipe) -> list[Choice]:
    """Passes and ways to store weights: what is asked of a model beside its sites."""
    return [choice for choice in choices(recipe) if mechanisms()[choice.mechanism].part == "model"]


def _asked_kind(recipe: Recipe | None) -> str:
    return _farthest({_kind_of(choice) for choice in choices(recipe)}) if recipe else ""


def _kind_of(choice: Choice) -> str:
    return mechanism(choice.mechanism, **choice.settings).kind


def _farthest(kinds: set[str]) -> str:
    return next((kind for kind in KINDS[::-1] if kind in kinds), "")


def _first_line(fault: Exception) -> str:
    return f"{type(fault).__name__}: {str(fault).strip().partition(chr(10))[0]}"
