"""A recipe's bounds after training: what still breaks them is rolled back, refused or warned of, as the recipe says."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..held_out import Batch
from ..hosting import hosting
from ..pipeline import broken_bound
from ..refusal import Refused
from ..report import Row
from ..verification import Deviation, compare_outputs, mean_of
from .loop import judging, site_errors
from .pair import Pair
from .transfer import transfers

log = logging.getLogger("reattend")


def hold(pair: Pair, calls: Sequence[Batch], described: str) -> None:
    """Measure the output again, enforce the bounds, and put both into the report."""
    work = pair.work
    verify = work.recipe.verify
    while True:
        deviation = output_deviation(pair, calls)
        broken = broken_bound(verify, deviation)
        left = _rewritten(pair)
        if not broken or not left or verify.otherwise != "rollback":
            break
        errors = site_errors(pair, calls, lambda view: transfers(view.outcome, frozenset()))
        worst = max(left, key=lambda path: errors.get(path, 0.0))
        log.warning("%s: rolled back after recovery: %s", worst, broken)
        _roll_back(pair, worst, f"rolled back after recovery: {broken}")
    if work.report is not None:
        work.report.output, work.report.data = deviation, described
    if broken and verify.otherwise == "refuse":
        raise Refused(broken, where="recover", fits="more steps, another `train`, a looser bound, or `else: rollback`")
    if broken and verify.otherwise == "warn" and work.report is not None:
        work.report.warnings = (*work.report.warnings, f"after recovery {broken}")


def output_deviation(pair: Pair, calls: Sequence[Batch]) -> Deviation:
    found = []
    with judging(pair.student):
        for args, kwargs in calls:
            got, expected = pair.student(*args, **kwargs), pair.teacher(*args, **kwargs)
            found.append(compare_outputs(_plain(got), _plain(expected)))
    return mean_of(found)


def _plain(output: Any) -> Any:
    """A library's output as a dict: whatever it is registered as."""
    if not hasattr(output, "items"):
        return output
    return {n: v for n, v in output.items() if n != "loss" and not hasattr(v, "layers")}


def _rewritten(pair: Pair) -> list[str]:
    settled = pair.work.settled
    return list(settled.changed) if settled is not None else []


def _roll_back(pair: Pair, path: str, reason: str) -> None:
    """The site as it was, in every graph from now on; the weights stay as they were trained."""
    work, state = pair.work, hosting(pair.student)
    assert work.settled is not None
    changed = {p: now for p, now in work.settled.changed.items() if p != path}
    work.settled = replace(work.settled, changed=changed, rolled_back={**work.settled.rolled_back, path: reason})
    if work.report is not None:
        work.report.rows = tuple(_rolled(row, reason) if row.site.path == path else row for row in work.report.rows)
    state.graphs.clear()
    state.small.clear()
    state.current = None
    pair.views.clear()
    for name in [n for n, _ in pair.student.named_parameters() if n.startswith(f"{path}.reattend.")]:
        where, _, last = name.rpartition(".")
        del pair.student.get_submodule(where)._parameters[last]
        work.store.parameters.pop(name, None)


def _rolled(row: Row, reason: str) -> Row:
    return Row(row.site, "rolled back", reason=reason, rule=row.rule, before=row.before, after=row.before)
