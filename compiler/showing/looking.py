"""From a report, or from what was found before any rewrite, to the view of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..cost import Cost, sizes
from ..decisions import decide
from ..devices import device_of
from ..heads.table import HeadTable
from ..kv_bytes import cache_bytes
from ..nodes import args_of, op_name
from ..program import Change, Program
from ..recipe import Recipe
from ..site import Site
from .computing import Example, example, numbered, with_footprints
from .layered import Seen, layered, seen
from .view import REFUSED, Computation, Layer, Measure, Module, Pair, Rule, View

if TYPE_CHECKING:
    from ..explanation import Explanation
    from ..report import Report, Row

DEVICE = "cpu"  # what predicted times are for
NO_DETAILS = "a report that was loaded from a file: its graph and its cards were not kept"


@dataclass(frozen=True)
class Details:
    """What a rewriting knows beside its report; looked at when the report is made, shown when someone asks."""

    sites: tuple[Site, ...]
    specs: Mapping[str, str]  # by path, of what stood there
    calls: Mapping[str, tuple[int, int]]  # batch and keys of the example call
    changes: tuple[Change, ...]
    before: tuple[Seen, ...]
    after: tuple[Seen, ...]
    recipe: Recipe
    dtype: torch.dtype = torch.float32
    examples: Mapping[str, Example] = field(default_factory=dict)  # by spec, of the example call
    own: Mapping[str, Sequence[Change]] = field(default_factory=dict)  # the changes by path
    held: dict[Any, Pair] = field(default_factory=dict)  # caches of sites that are alike are counted once

    @staticmethod
    def of(reference: Program, program: Program, recipe: Recipe) -> Details:
        attends = {site.path: reference.ports[site.path].attend for site in reference.sites}
        keys = {path: sizes(args_of(node)[1][0].meta["val"]) for path, node in attends.items()}
        queries = {path: args_of(node)[0].meta["val"] for path, node in attends.items()}
        own: dict[str, list[Change]] = {}
        for change in program.changes:
            own.setdefault(change.site.path, []).append(change)
        return Details(
            sites=reference.sites,
            specs={path: str(node.args[3]) for path, node in attends.items()},
            calls={path: (sizes(q)[0], keys[path][2]) for path, q in queries.items()},
            changes=tuple(program.changes),
            before=seen(reference.graph),
            after=seen(program.graph),
            recipe=recipe,
            dtype=next(iter(queries.values())).dtype if queries else torch.float32,
            own=own,
            examples={
                **{str(node.args[-1]): example(node) for node in attends.values()},
                **{str(n.args[-1]): example(n) for change in program.changes for n in attends_in(change)},
            },
        )

    @cached_property
    def computations(self) -> Mapping[tuple[str, int], Computation]:
        """Of what stood at the sites and of what stands there now."""
        found = [(spec, self.calls[path][1]) for path, spec in self.specs.items()]
        found += [(spec, self.calls[c.site.path][1]) for c in self.changes for spec in specs_of(c)]
        return numbered(found)

    @cached_property
    def graph(self) -> tuple[Module, ...]:
        return layered(self.before, self.after)

    def kv(self, site: Site) -> Pair | None:
        if site.pattern != "causal-self":
            return None
        batch, tokens = self.calls[site.path]
        own = self.own.get(site.path, [])
        alike = replace(site, path="", index=0, weights=()), *(c.mechanism for c in own), batch, tokens
        if alike not in self.held:
            both: tuple[Mapping[str, Sequence[Change]], ...] = ({}, {site.path: own})
            sides = (cache_bytes([site], c, batch=batch, tokens=tokens, dtype=self.dtype) for c in both)
            self.held[alike] = Pair(*map(float, sides))
        return self.held[alike]

    def rules(self) -> tuple[Rule, ...]:
        """Each rule with the sites whose decision it was."""
        decisions = decide(self.recipe, self.sites)
        return tuple(
            Rule(
                f"{rule.match}: " + ", ".join(f"{key}: {wish}" for key, wish in rule.decides),
                rule.where,
                tuple(d.path for d in decisions if any(one.where == rule.where for one in d.decided)),
            )
            for rule in self.recipe.rules
        )


def attends_in(change: Change) -> list[fx.Node]:
    """Those inside a mechanism's fragment."""
    return [n for n in change.fragment.graph.graph.nodes if op_name(n) == "attend"]


def specs_of(change: Change) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(n.args[-1]) for n in attends_in(change)))


def view_of(
    report: Report,
    details: Details | None = None,
    *,
    heads: HeadTable | None = None,
    plot: str = "",
    targets: Sequence[str] = (),
) -> View:
    """Everything there is to see of a rewrite; kernels compiled for `targets`."""
    examples = details.examples if details else {}
    return View(
        title=report.model,
        verdict=report.verdict(),
        recipe=report.recipe,
        facts=_facts(report),
        layers=tuple(_layer(row, details) for row in report.rows),
        next=next_steps(report),
        lists=(*report.lists(), *((("left out", (NO_DETAILS,)),) if details is None else ())),
        computations=with_footprints(details.computations.values(), examples, targets) if details else (),
        graph=details.graph if details else (),
        rules=details.rules() if details else (),
        heads=measures_of(heads) if heads is not None else (),
        plot=plot,
        device=device_of(DEVICE).source,
    )


def view_of_rows(rows: Sequence[Row]) -> View:
    """Some sites of a report, without what surrounds them."""
    said = rows[0].site.path if len(rows) == 1 else f"{len(rows)} sites"
    told = ", ".join(f"{n} {status}" for status, n in Counter(row.status for row in rows).items())
    return View("sites", f"{said}; {told}", layers=tuple(_layer(row, None) for row in rows))


def view_of_sites(found: Explanation, title: str = "the model as it is") -> View:
    """A model that nothing was done to: its sites, their masks, what fits them."""
    keys = [_number(site.keys) for site in found.sites]
    computations = numbered(list(zip(found.specs, keys)))
    costs = found.costs or tuple(Cost() for _ in found.sites)
    layers = tuple(
        Layer(
            path=site.path, status="found", facts=(*site.said(), *found.fitting(k)), before=computations[pair].key,
            work=Pair(cost.flops, cost.flops), moved=Pair(cost.bytes, cost.bytes), time=_time(cost, cost),
        )
        for k, (site, pair, cost) in enumerate(zip(found.sites, zip(found.specs, keys), costs))
    )  # fmt: skip
    count = f"{len(layers)} site" + "s" * (len(layers) != 1)
    return View(
        title=title,
        verdict=f"{count}; nothing was changed",
        layers=layers,
        next=("reattend.optimize(model, recipe) rewrites it; a site's card lists what fits there",) if layers else (),
        lists=tuple((n, e) for n, e in (("looks like attention and was not raised", found.misses),
                                        ("notes", found.notes)) if e),
        computations=tuple(computations.values()),
        device=device_of(DEVICE).source,
    )  # fmt: skip


def _number(size: str) -> int:
    """A size that is still open is drawn at 256 tokens."""
    return int(size) if size.isdecimal() else 256


def _layer(row: Row, details: Details | None) -> Layer:
    path = row.site.path
    own = details.own.get(path, []) if details else []
    key: Callable[[str], str] = lambda spec: details.computations[spec, details.calls[path][1]].key if details else ""
    same = row.status in (REFUSED, "rolled back")
    dropped = ((("drops", ", ".join(row.dropped)),) if row.dropped else ()) + tuple(("counted", c) for c in row.counted)
    tensors = (("new tensors", ", ".join(t for c in own for t in c.tensors)),) if any(c.tensors for c in own) else ()
    counted = row.before.flops or row.after.flops
    return Layer(
        path=path,
        status=row.status,
        mechanism=row.mechanism,
        slug=own[0].mechanism.slug if own else row.mechanism.partition("(")[0],
        kind=row.kind,
        reason=_reason(row),
        deviation=row.deviation.relative if row.deviation else None,
        says=str(row.deviation) if row.deviation else "",
        work=Pair(row.before.flops, row.after.flops) if counted and not same else None,
        moved=Pair(row.before.bytes, row.after.bytes) if counted and not same else None,
        time=_time(row.before, row.after) if counted and not same else None,
        kv=details.kv(row.site) if details else None,
        rule=row.rule,
        facts=(*row.site.said(), *dropped, *tensors),
        before=key(details.specs[path]) if details else "",
        after=tuple(key(spec) for change in own for spec in specs_of(change)),
    )


def _reason(row: Row) -> str:
    """Without the site's own name in front: it stands in the same line."""
    exact = f"exact: float64 error {row.exact_error:.2g}" if row.exact_error is not None else ""
    return "; ".join(filter(None, (exact, row.reason.removeprefix(f"{row.site}: "))))


def _time(before: Cost, after: Cost) -> Pair:
    device = device_of(DEVICE)
    return Pair(*(device.seconds(c.flops, c.bytes, torch.float32) for c in (before, after)))


def _facts(report: Report) -> tuple[tuple[str, str], ...]:
    t, captured = report.timing, report.captured
    found = (
        ("model", report.model),
        ("recipe", report.recipe),
        ("output, measured", f"{report.output} ({report.data})" if report.output else ""),
        ("time, measured here", f"{t.before:.2f} ms → {t.after:.2f} ms, {t.runs} pairs, {t.sizes}" if t else ""),
        ("cost, predicted", f"{report.predicted[0]} → {report.predicted[1]}"),
        ("graph before any rewrite, against the model", str(captured) if captured else ""),
        ("recovered", report.recovered),
    )
    return tuple((name, value) for name, value in found if value)


def next_steps(report: Report) -> tuple[str, ...]:
    """What a reader would do now, most pressing first."""
    statuses = {row.status for row in report.rows}
    new = [row for row in report.rows if row.status == "rewritten"]
    untrained = not report.recovered and any(row.kind == "needs recovery" for row in new)
    found = [
        ("train back what the rewrite lost: reattend.recover(fast, data), or `reattend recover`", untrained),
        ("slower than the original on this machine: keep the original here, or judge on the target by "
         "`reattend preview` and `reattend bench`", report.timing is not None and report.timing.slower),
        ("a refused site says what would fit; `drop: [...]` in its rule permits the loss of a feature",
         REFUSED in statuses),
        ("loosen the bound, or leave the rolled-back sites out of the rule", "rolled back" in statuses),
        ("judge quality on held-out data: optimize(..., data=batches), or `reattend quality`",
         "quality" in report.data and any(row.kind != "exact" for row in new)),
        ("see how the result leaves the process: fast.ships()", bool(new) and not untrained),
        ("a recipe's rules choose sites: `reattend sites` lists them", not statuses & {"rewritten", REFUSED}),
    ]  # fmt: skip
    return tuple(step for step, holds in found if holds)


def measures_of(table: HeadTable) -> tuple[Measure, ...]:
    """A measure at a time: a row of heads for every site."""
    paths = tuple(dict.fromkeys(head.site for head in table))
    return tuple(
        Measure(name, paths, tuple(tuple(h.values[name] for h in table if h.site == path) for path in paths))
        for name in table.measures
    )


def joined(parts: Sequence[Details]) -> Details:
    """Of a model that was rewritten in several islands."""
    first = parts[0]
    return Details(
        sites=tuple(s for p in parts for s in p.sites),
        specs={path: spec for p in parts for path, spec in p.specs.items()},
        calls={path: call for p in parts for path, call in p.calls.items()},
        changes=tuple(c for p in parts for c in p.changes),
        before=tuple(s for p in parts for s in p.before),
        after=tuple(s for p in parts for s in p.after),
        recipe=first.recipe,
        dtype=first.dtype,
        own={path: own for p in parts for path, own in p.own.items()},
    )
