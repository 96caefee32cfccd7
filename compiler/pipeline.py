"""The stages on one page: a captured graph is raised, rewritten by steps, checked, and lowered to what runs."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx

from .capture import Captured
from .facts import describe
from .from_seed import from_seed
from .masks import fold_masks
from .mechanism import Mechanism
from .primitives.operator import Ran, watched
from .program import Program, Store
from .raising import raise_sites
from .recipe import Verify
from .refusal import Refused
from .rewrite import put
from .verification import Deviation, SiteResult, check_sites, compare_outputs, mean_of, worst_first, worst_of

log = logging.getLogger("reattend")
# parts or stages in their order; how k and v are stored comes first: what is put at a site reads them as they come back
ORDER = ("cache", "core", "region", "gate", "model", "insert", "quantize")


@dataclass(frozen=True)
class Step:
    """One mechanism at one site, or (path "") one whole-model pass over an ordered list of sites."""

    path: str
    mechanism: Mechanism
    dropped: frozenset[str] = frozenset()
    rule: str = ""
    paths: tuple[str, ...] = ()


@dataclass
class Outcome:
    """A rewritten program, what it was made from, and what was refused on the way."""

    reference: Program
    program: Program
    refused: list[tuple[Step, Refused]] = field(default_factory=list)
    misses: tuple[str, ...] = ()


def raise_program(captured: Captured, store: Store, prefix: str = "") -> tuple[Program, tuple[str, ...]]:
    """Every attention as one node, masks as predicates, facts and ports; and what only looked like attention."""
    raised = raise_sites(captured.graph)
    fold_masks(captured.graph)
    sites, ports = describe(captured.graph, prefix)
    training = captured.key.setting[0].startswith("train")
    program = Program(captured.graph, sites, ports, store, prefix, training, notes=list(captured.notes))
    return program, shown_misses(raised.misses, prefix)


def shown_misses(misses: Iterable[Any], prefix: str = "") -> tuple[str, ...]:
    """A line for each place that looks like attention and was not raised: where, why, the node."""
    places = [".".join(part for part in (prefix, miss.where) if part) for miss in misses]
    return tuple(": ".join(filter(None, (p, f"{m.reason} (%{m.node})"))) for p, m in zip(places, misses))


def rewrite(raised: Program, steps: Iterable[Step], *, without: frozenset[str] = frozenset()) -> Outcome:
    """Replay the steps on a copy of the raised program; a refused step leaves its site as it was.

    Steps of the stage `weights` are not replayed: they changed the model's own weights (compiler/algebra/stage.py).
    """
    program = raised.copy()
    outcome = Outcome(raised, program)
    again = (s for s in steps if s.path not in without and s.mechanism.stage != "weights")
    wanted = sorted(again, key=lambda s: ORDER.index(_turn(s)))
    for part, stage in groupby(wanted, key=_turn):
        for step in stage:
            try:
                _apply(program, step)
            except Refused as refused:
                outcome.refused.append((step, refused))
        _still_valid(program, part)
    _give_extras(program)
    program.graph.graph.eliminate_dead_code()
    program.graph.recompile()
    return outcome


def _turn(step: Step) -> str:
    return step.mechanism.stage if step.mechanism.stage in ORDER else step.mechanism.part


def _still_valid(program: Program, part: str) -> None:
    """Valid before, valid after: a stage that leaves a broken graph is named."""
    try:
        program.graph.graph.lint()
    except RuntimeError as error:
        raise RuntimeError(f"the stage of {part} mechanisms left a graph that is not valid: {error}") from None


def _give_extras(program: Program) -> None:
    """Named losses, new buffer values and values to look at are outputs behind the model's own."""
    extra = [node for _, node in (*program.losses, *program.buffers, *program.traces)]
    if extra:
        output: Any = next(iter(program.graph.graph.find_nodes(op="output")))
        output.args = ((*output.args[0], *extra),)


def _apply(program: Program, step: Step) -> None:
    if step.mechanism.part == "model":
        step.mechanism.apply(program, step.paths or tuple(s.path for s in program.sites))
        program.whole_model += 1
    else:
        put(program, step.path, step.mechanism, dropped=step.dropped)


def lower(program: Program, captured: Captured) -> Captured:
    """The rewritten graph in the captured one's place: same arguments, same output, its extras named."""
    return replace(
        captured,
        graph=program.graph,
        losses=tuple(name for name, _ in program.losses),
        buffers=tuple(name for name, _ in program.buffers),
        traces=tuple(name for name, _ in program.traces),
        replaced=dict(program.replaced),
    )


def broken_bound(verify: Verify, deviation: Deviation) -> str:
    """Which of the recipe's bounds the output breaks, or ""; an output of another shape breaks them all."""
    measured = {
        "max_error": deviation.relative,
        "min_cosine": deviation.cosine,
        "max_kl": deviation.kl,
        "min_top1": deviation.top1,
    }
    for name, bound in verify.bounds.items():
        value = measured[name]
        if value is not None and not (value <= bound if name.startswith("max") else value >= bound):
            return f"{name}: {value:.4g} is beyond {bound}"
    return ""


@dataclass
class Checked:
    outcome: Outcome
    sites: list[SiteResult]
    deviation: Deviation
    rolled_back: dict[str, str]
    waits: bool = False  # the bounds are asked after training
    ran: tuple[Ran, ...] = ()  # what the rewritten graph called


def checked_rewrite(
    raised: Program,
    steps: Sequence[Step],
    batches: Sequence[Sequence[Tensor]],
    verify: Verify,
    *,
    wait: bool = False,
) -> Checked:
    """Rewrite, measure, and where a check fails replay without the site that is to blame, until everything holds.

    wait: training follows, so that the bounds are asked of exact rewrites only.
    """
    rolled_back: dict[str, str] = {}
    while True:
        outcome = rewrite(raised, steps, without=frozenset(rolled_back))
        results = worst_of([check_sites(raised, outcome.program.changes, inputs) for inputs in batches])
        wrong = {r.path: r.failed for r in results if r.failed}
        with watched() as ran:
            deviation = mean_of([_deviation(raised, outcome.program, inputs) for inputs in batches])
        waits = wait and any(c.mechanism.kind != "exact" for c in outcome.program.changes)
        broken = "" if waits else broken_bound(verify, deviation)
        whole = outcome.program.whole_model > 0
        if not wrong and broken and (results or whole):
            if verify.otherwise == "refuse":
                raise Refused(broken, where="verify", fits="loosen the bound, rewrite fewer sites, or `else: rollback`")
            if verify.otherwise == "rollback":
                worst = worst_first(results)[0].path if results else ""  # "": the whole-model passes, all that is left
                wrong = {worst: f"rolled back: {broken}"}
        if not wrong:
            return Checked(outcome, results, deviation, rolled_back, waits, tuple(ran))
        for path, reason in wrong.items():
            log.warning("%s: %s", path or "whole-model passes", reason)
        rolled_back |= wrong


def _deviation(raised: Program, program: Program, inputs: Sequence[Tensor]) -> Deviation:
    expected = _outputs(raised.graph, inputs)
    if program.changes_shape:
        return Deviation(math.nan, math.nan, math.nan)
    return compare_outputs(_outputs(program.graph, inputs)[: len(expected)], expected)


def _outputs(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
    """On the draws of one seed: a model that leaves tokens out by chance leaves out the same ones."""
    with torch.no_grad(), from_seed(0, next((t.device for t in inputs), None)):
        return tuple(graph(*inputs))
