"""Which ways lead out of the process for a rewritten model, and the reason for each that does not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..giving_way import ours
from ..hosted import way_out
from ..hosting import hosting, original
from ..mechanism import mechanisms
from ..refusal import Refused, nearest
from .exporting import why_no_compiler, why_not_export, write_aoti, write_torch
from .fewer_heads import joined, why_not_fewer, with_fewer_heads
from .stock import is_stock

EXPORTS = ("hf", "torch", "aoti")


@dataclass(frozen=True)
class Route:
    """One way out: open, or the reason why not."""

    name: str
    reason: str = ""

    @property
    def open(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        return f"{self.name:<21} {'yes' if self.open else f'no: {self.reason}'}"


@dataclass(frozen=True)
class Routes:
    """All routes of one model; prints one line each."""

    all: tuple[Route, ...]

    def __getitem__(self, name: str) -> Route:
        for route in self.all:
            if route.name == name:
                return route
        raise Refused(f"route {name!r}", fits=nearest(name, [r.name for r in self.all]))

    def __str__(self) -> str:
        return "\n".join(map(str, self.all))

    __repr__ = __str__

    def to_dict(self) -> dict[str, str]:
        return {route.name: route.reason or "yes" for route in self.all}


@way_out("ships")
def routes(fast: Any) -> Routes:
    """The routes of a hosted model, as its graph of the last call (or the first one) stands."""
    return Routes(
        (
            Route("save_pretrained/load", _why_not_saved(fast)),
            Route("hf", _why_not_stock(fast)),
            Route("torch", _why_not_packaged(fast)),
            Route("aoti", _why_not_packaged(fast) or why_no_compiler()),
            Route("generate", _why_not_generated(fast)),
        )
    )


@way_out("export")
def export(fast: Any, route: str, path: str | Path) -> Path:
    """Write a model by one route; refused with what stands in the way."""
    if route not in EXPORTS:
        raise Refused(f"route {route!r}", where="export", fits=nearest(route, EXPORTS))
    target = Path(path)
    if route == "hf":
        if reason := _why_not_stock(fast):
            raise Refused(reason, where="export hf", fits="save_pretrained, and reattend.load where it is used")
        changes = joined(hosting(fast).about)
        stock: Any = with_fewer_heads(fast, changes) if changes else original(fast)
        stock.save_pretrained(target)
        return target
    if reason := _why_not_packaged(fast):
        raise Refused(reason, where=f"export {route}")
    return (write_torch if route == "torch" else write_aoti)(_captured(fast), target)


def _captured(fast: Any) -> Any:
    state = hosting(fast)
    ours(fast, "graph")  # asking for it puts the model's present tensors into the graph
    return state.graphs[state.current or next(iter(state.graphs))]


def _why_not_saved(fast: Any) -> str:
    return "" if hosting(fast).about is not None else "it was not made by optimize()"


def _why_not_stock(fast: Any) -> str:
    """What a stock model of the same class would not compute."""
    if not is_stock(type(fast)):
        return f"{type(fast).__name__} is no class of transformers"
    report = hosting(fast).about.report if hosting(fast).about is not None else None
    if report is None:
        return "no call has been captured yet"
    changed = [row for row in report.rows if row.status == "rewritten" and (row.kind != "exact" or row.dropped)]
    fewer = joined(hosting(fast).about)
    if changed and fewer:
        return why_not_fewer(fast, fewer)
    if changed:
        shown = ", ".join(f"{row.site.path} ({row.mechanism.partition('(')[0]})" for row in changed[:3])
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        return f"{len(changed)} sites compute something else than the stock class: {shown}{more}"
    if report.passes:
        return f"whole-model passes: {', '.join(report.passes)}"
    added = [name for name, _ in fast.new_parameters()]
    return f"new parameters: {', '.join(added[:3])}" if added else ""


def _why_not_packaged(fast: Any) -> str:
    if not hosting(fast).graphs:
        return "no call has been captured yet: call the model once"
    return why_not_export(_captured(fast))


def _why_not_generated(fast: Any) -> str:
    if not (hasattr(fast, "can_generate") and fast.can_generate()):
        return f"{type(fast).__name__} has no generate()"
    work = hosting(fast).about
    passes = [choice.mechanism for recipe in (work.recipes if work is not None else ()) for choice in recipe.passes]
    merging = [slug for slug in passes if mechanisms()[slug].stage != "weights"]
    return f"whole-model passes see other tokens at each step: {', '.join(merging)}" if merging else ""
