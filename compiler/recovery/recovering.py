"""Recovery from start to end: checks before any work, the run, then deltas merged, bounds held, the report told."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..held_out import Batch, as_batch
from ..hosting import about, hosting, is_hosted, original
from ..refusal import Refused
from ..signature import forward_signature
from ..site import Site
from .bounds import hold
from .calls import Calls, fitting, kept_apart, listed, rows_of
from .checkpoint import Folder
from .finite import NotFinite
from .loop import Judge, Run
from .pair import Pair, pair_of
from .plan import Plan
from .trained import Trained

log = logging.getLogger("reattend")


@dataclass(frozen=True)
class Recovered:
    """What a recovery brought: the judgement before it, the best one, and all between."""

    plan: Plan
    trained: int  # numbers that moved
    steps: int
    best_at: int
    seconds: float
    history: tuple[Mapping[str, Any], ...] = field(repr=False, default=())

    @property
    def before(self) -> Mapping[str, Any]:
        return self.history[0]

    @property
    def after(self) -> Mapping[str, Any]:
        return next(one for one in self.history if one["step"] == self.best_at)

    def __str__(self) -> str:
        names = [n for n in self.before if n in self.after and n not in ("step", "stage", "loss", "held_out")]
        gains = ", ".join(f"{n} {self.before[n]:.4g} -> {self.after[n]:.4g}" for n in names if n != "sites")
        how = f"train {self.plan.train}, {self.trained:,} numbers, best at step {self.best_at} of {self.steps}"
        return f"held-out {gains} ({how})"

    def to_dict(self) -> dict[str, Any]:
        return {
            "before": dict(self.before), "after": dict(self.after), "trained": self.trained, "steps": self.steps,
            "best_at": self.best_at, "seconds": round(self.seconds, 1),
        }  # fmt: skip


def recover(
    fast: Any,
    data: Iterable[Any] | Callable[[int], Any],
    held_out: Iterable[Any] | None,
    plan: Plan,
    *,
    folder: str | Path | None = None,
    judge: Judge | None = None,
    teacher: nn.Module | None = None,
    progress: bool = True,
) -> Recovered:
    source, judged = kept_apart(listed(data), _judged(fast, held_out))
    _known_arguments(fast, [*judged, *(source[:64] if not callable(source) else [as_batch(source(0))])])
    pair = pair_of(fast, teacher, judged)
    trained = Trained(fast, rewritten_sites(pair, judged[0]), plan.train, rank=plan.rank, seed=plan.seed)
    kept = Folder(folder, plan, _fingerprint(source, judged)) if folder is not None else None
    start, graphs = trained.state(), dict(hosting(fast).graphs)
    failed: NotFinite | None = None
    run = Run(pair, trained, Calls(source, stack=plan.batch, seed=plan.seed), judged, plan,
              folder=kept, judge=judge, progress=progress)  # fmt: skip
    try:
        run.train()
    except NotFinite as strange:
        failed = strange
    except BaseException:  # interrupted: as it was, so that a second call goes on from the folder
        trained.load(start)
        raise
    trained.load(run.best)
    _settle(pair, trained, plan, graphs)
    found = Recovered(plan, trained.count, run.state.total, run.state.best_at, run.state.seconds,
                      tuple(run.state.history))  # fmt: skip
    _say(pair, found)
    if failed is not None:
        kind = f"the weights are the best judged, of step {found.best_at}"
        fits = f"{kind}; a smaller lr, a longer warmup" + (", float32" if plan.bfloat16 else "")
        raise Refused(f"{failed.found} after step {found.steps}", where=f"recover: {failed.where}", fits=fits)
    given = pair.work.batches
    hold(pair, given or judged, pair.work.described if given else f"{len(judged)} held-out calls of recovery")
    return found


def rewritten_sites(pair: Pair, call: Batch) -> tuple[Site, ...]:
    """Sites that compute something else than before."""
    changes = pair.view(call).outcome.program.changes
    return tuple({c.site.path: c.site for c in changes if c.mechanism.kind != "exact"}.values())


def _judged(fast: Any, held_out: Iterable[Any] | None) -> Sequence[Batch]:
    """Calls to judge on: those given, else those that the model was optimized with as data."""
    if held_out is not None:
        return [as_batch(call) for call in held_out]
    return tuple(about(fast).batches) if is_hosted(fast) and about(fast) is not None else ()


def _known_arguments(fast: Any, calls: Sequence[Batch]) -> None:
    if not is_hosted(fast):
        return  # refused by name a little later
    known = next(iter(hosting(fast).graphs), None)
    signature = forward_signature(original(fast))
    for number, call in enumerate(calls):
        fitting(call, signature, known, f"call {number} of the data")


def _fingerprint(source: Any, judged: Sequence[Batch]) -> str:
    """Tells other data apart when a run is resumed: its first call and those it is judged on."""
    first = as_batch(source(0)) if callable(source) else source[0]
    return "".join(sorted(row.hex()[:16] for row in (*rows_of([first]), *rows_of(judged))))


def _settle(pair: Pair, trained: Trained, plan: Plan, graphs: Mapping[Any, Any]) -> None:
    """The deltas find their place; graphs captured while they were beside the weights are made again when needed."""
    state = hosting(pair.student)
    for key in [k for k in state.graphs if k not in graphs]:
        del state.graphs[key]
    if state.current not in state.graphs:
        state.current = None
    if plan.merge:
        trained.merge()
    else:
        trained.attach()
    if trained.touched:
        pair.work.trained = f"train: {plan.train}"


def _say(pair: Pair, found: Recovered) -> None:
    if pair.work.report is not None:
        pair.work.report.recovered = str(found)
    log.info("recovered: %s", found)
    if torch.is_grad_enabled() and not found.best_at:
        log.warning("recovery found nothing better than where it began")
