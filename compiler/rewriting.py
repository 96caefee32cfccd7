"""One recipe at work on one model: the first call decides and is verified, further signatures replay the decisions."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .algebra.stage import Moved, move_weights
from .capture import Captured, capture
from .cost import Cost, graph_cost, site_costs
from .draft import drafting
from .fidelity import against_model, too_far
from .held_out import Batch, calibration
from .held_rows import as_bytes, as_numbers
from .keeping import Ring, State, keeping
from .kernel_status import by_torch
from .lowering import lower_calls
from .mechanism import KINDS
from .pipeline import Checked, Outcome, Step, checked_rewrite, lower, raise_program, rewrite
from .program import Change, Program, Store
from .quantize import QuantizeLayers
from .quick import never_quick
from .recipe import Recipe
from .refusal import Refused
from .report import NO_DATA, Report, Row, SiteList
from .ringed import ringed, unringed
from .showing.looking import Details
from .signature import Call
from .site import Site
from .stage_line import stage
from .steps import PLACED, fitting, steps_of
from .verification import Deviation, SiteResult
from .weights_asked import gives_weights, weights_asked

log = logging.getLogger("reattend")


@dataclass(frozen=True)
class Settled:
    """What the first call decided for every later one."""

    rolled_back: Mapping[str, str]  # path to reason
    changed: Mapping[str, tuple[str, ...]]  # what stands at each site that computes something else than before
    refused: frozenset[tuple[str, str]] = frozenset()  # (path, mechanism): a site that was left as it was stays so

    def within(self, path: str) -> Settled:
        """What was decided for the sites of one part, which may be a site itself."""
        inside = {p: done for p, done in self.changed.items() if p.startswith((f"{path}.", f"{path}#")) or p == path}
        return replace(self, changed=inside)


@dataclass
class Rewriting:
    """Holds what all signatures share: the recipes, the new tensors, what was decided and rolled back."""

    recipes: tuple[Recipe, ...]
    name: str
    prefix: str = ""  # where the model stands in a whole that could not be captured
    store: Store = field(default_factory=Store)
    notes: list[str] = field(default_factory=list)
    first: Checked | None = None
    settled: Settled | None = None
    captured: Captured | None = None
    misses: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    declined: dict[str, str] = field(default_factory=dict)  # sites at which a split cannot stand
    report: Report | None = None
    faithful: Deviation | None = None  # the raised graph against the model itself
    unfaithful: str = ""  # what to say where it is another

    moved: Moved = field(default_factory=Moved)  # weights that exact rewrites have changed
    weights_of: int = 0  # recipes whose rewrites of weights stand in the model already

    batches: tuple[Batch, ...] = ()  # held-out calls that quality is judged on
    described: str = ""  # how the report names them
    trained: str = ""  # how the original's weights were changed by recovery
    kept: Mapping[int, Ring | State] | None = None  # by layer, once it was asked for or read from a file

    @staticmethod
    def after(earlier: Rewriting | None, recipe: Recipe, name: str, notes: Sequence[str]) -> Rewriting:
        """One more recipe, behind those of a model that was rewritten before."""
        if earlier is None:
            return Rewriting((recipe,), name, notes=list(notes))
        moved = len(earlier.recipes) if earlier.settled is not None else 0
        return Rewriting((*earlier.recipes, recipe), name, store=earlier.store, notes=list(notes), weights_of=moved)

    def __deepcopy__(self, memo: dict[int, Any]) -> Rewriting:
        """A copied model is rewritten by the same decisions; its tensors are its own."""
        return self

    @property
    def sites(self) -> SiteList:
        return SiteList(self.report.rows if self.report else ())

    @property
    def recipe(self) -> Recipe:
        return self.recipes[-1]

    @property
    def keeps(self) -> Mapping[int, Ring | State] | None:
        """What layers of a decoder keep in place of all rows; None before the first call was rewritten."""
        if self.kept is None and self.first is not None:
            self.kept = keeping(self.first.outcome.program)
        return self.kept

    def program_for(self, model: nn.Module, call: Call) -> Captured:
        """The lowered graph of one call's signature."""
        with drafting():
            plain = unringed(as_numbers(call))
            captured = ringed(as_bytes(self._program_for(model, plain), plain), call)
            lower_calls(captured.graph, self.recipe.target)
            if self.recipe.target == "eager":
                never_quick(captured.graph)
            return captured

    def _program_for(self, model: nn.Module, call: Call) -> Captured:
        stage("capturing")
        captured = capture(model, call.args, dict(call.kwargs))
        stage("looking for attention")
        raised, misses = raise_program(captured, self.store, self.prefix)
        steps, warnings = self._steps(raised)
        at_sites = [step for step in steps if step.mechanism.stage != "quantize"]
        if at_sites and weights_asked(model, call):
            self._gives_weights(at_sites, captured)
        if self.settled is None:
            return self._decide(model, captured, raised, steps, misses, warnings, call)
        return lower(self._again(raised, steps, captured, self.settled).program, captured)

    def part(self, path: str) -> Rewriting | None:
        """The same decisions for a part of the model that is called alone; None where nothing in it was changed."""
        place = ".".join(filter(None, (self.prefix, path)))
        inside = self.settled.within(place) if self.settled is not None else None
        if inside is None or not inside.changed:
            return None
        return replace(self, prefix=place, settled=inside, moved=Moved())

    def replay(self, model: nn.Module, call: Call) -> tuple[Captured, Outcome]:
        """What was decided, on a capture of its own: the graph before any rewrite and after, with sites and ports."""
        with drafting():
            call = unringed(as_numbers(call))
            captured = capture(model, call.args, dict(call.kwargs))
            raised, _ = raise_program(captured, self.store, self.prefix)
            assert self.settled is not None, "replay follows a first decision"
            return captured, self._again(raised, self._steps(raised)[0], captured, self.settled)

    def _again(self, raised: Program, steps: Sequence[Step], captured: Captured, settled: Settled) -> Outcome:
        still = [s for s in steps if (s.path, s.mechanism.slug) not in settled.refused]
        outcome = rewrite(raised, still, without=frozenset(settled.rolled_back))
        self._holds_as_before(outcome, captured, settled)
        return outcome

    def _gives_weights(self, steps: Sequence[Step], captured: Captured) -> None:
        """A rewritten site has no weights; where all rewrites are exact, a site whose weights are returned was left."""
        if all(s.mechanism.kind == "exact" for s in steps) and gives_weights(captured.output):
            return
        fits = "ask the original model for them, in its eager attention, or a recipe that keeps every site"
        raise Refused("output_attentions=True, and rewritten sites have no weights to give", where=self.name, fits=fits)

    def _steps(self, raised: Program) -> tuple[list[Step], tuple[str, ...]]:
        """The steps of every recipe in turn; a later recipe's wish for a part of a site replaces an earlier one's."""
        found: dict[tuple[str, str], Step] = {}
        warnings: list[str] = []
        for number, recipe in enumerate(self.recipes):
            steps, decisions = steps_of(recipe, raised.sites)
            for step in steps:
                if step.mechanism.stage == "weights" and number < self.weights_of:
                    continue
                part = "core" if step.mechanism.part == "region" else step.mechanism.part
                found[(step.path or f"{number}:{step.mechanism!r}", part)] = step
            warnings += decisions.warnings
            self.declined |= {d.path: one.refused for d in decisions for one in d.decided if one.refused}
        return list(found.values()), tuple(warnings)

    def _decide(
        self,
        model: nn.Module,
        captured: Captured,
        raised: Program,
        steps: Sequence[Step],
        misses: tuple[str, ...],
        warnings: tuple[str, ...],
        call: Call,
    ) -> Captured:
        if not raised.sites:
            nearest = "; ".join(misses) or "nothing in it multiplies a softmax of a product with values"
            raise Refused("no attention found", where=self.name, fits=nearest)
        stage("rewriting and checking")
        steps, unfit = self._weights_first(model, captured, raised, steps, call)
        batches = [_batch(captured, call, batch, number) for number, batch in enumerate(self.batches)]
        wait = self.recipe.recover is not None
        self.first = checked_rewrite(raised, steps, batches or [captured.inputs(call)], self.recipe.verify, wait=wait)
        self.store.grams = {}
        self.captured, self.misses = captured, misses
        self.faithful = None if captured.asks_again(call) else against_model(model, captured, call)
        self.unfaithful = too_far(self.faithful, model) if self.faithful is not None else ""
        self.warnings = (*warnings, *unfit, *_half_on_cpu(model), *filter(None, (self.unfaithful,)))
        if wait and self.first.waits:
            self.notes.append("the bounds wait for recover()")
        self.report = self._report(raised, steps)
        self._some_step_holds(steps)
        self.settled = _settled(self.first)
        return lower(self.first.outcome.program, captured)

    def _weights_first(
        self, model: nn.Module, captured: Captured, raised: Program, steps: Sequence[Step], call: Call
    ) -> tuple[list[Step], tuple[str, ...]]:
        """Weights are rewritten and fitted; the steps that are left, and a warning where there was no data for it."""
        read = lambda: self._calibration(captured, call)
        self.moved = move_weights(model, raised, steps, read)
        left = [step for step in steps if step.mechanism.stage != "weights"]
        fits = [s.mechanism.fit(raised, read) for s in left if isinstance(s.mechanism, QuantizeLayers)]
        if (self.moved.fitted or any(fits)) and self.recipe.data.calibrate is None:
            return left, ("no `data: {calibrate: FILE}`: weights were fitted to the example inputs",)
        return left, ()

    def _calibration(self, captured: Captured, call: Call) -> list[tuple[Tensor, ...]]:
        """The recipe's calibration data; without it the example inputs."""
        if self.recipe.data.calibrate is None:
            return [captured.inputs(call)]
        return [_batch(captured, call, batch, number) for number, batch in enumerate(calibration(self.recipe))]

    def _some_step_holds(self, steps: Sequence[Step]) -> None:
        """A recipe of which nothing could be done is refused with what would fit."""
        assert self.first is not None
        refused = self.first.outcome.refused
        if self.moved.refused and not steps and not self.moved.lines:
            raise self.moved.refused[0][1]
        if self.declined and not steps:
            path, reason = next(iter(self.declined.items()))
            raise Refused(reason, where=path)
        if refused and len(refused) == len(steps):
            step, refusal = refused[0]
            others = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
            site = next((s for s in self.first.outcome.reference.sites if s.path == step.path), None)
            others_fit = fitting(site) if site is not None and step.mechanism.part in PLACED else ()
            fits = f"fits here: {', '.join(others_fit)} (reattend mechanisms --for MODEL@SITE)" if others_fit else ""
            raise Refused(f"{refusal}{others}", fits=fits)

    def _holds_as_before(self, outcome: Outcome, captured: Captured, settled: Settled) -> None:
        """A signature in which a rewritten site cannot be rewritten would be another model: refused.

        A site whose rewrite was exact computes the same without it.
        """
        done, now = settled.changed, _changed(outcome)
        ran = _modules_run(captured, self.prefix)
        lost = {p for p, mechanisms in done.items() if now.get(p) != mechanisms and (p in now or _place(p) in ran)}
        if lost:
            refused = (str(r) for s, r in outcome.refused if s.path in lost)
            other = (f"{' + '.join(done[p])} there, {' + '.join(now[p])} here" for p in sorted(lost) if p in now)
            why = next(refused, next(other, "the site is not there"))
            raise Refused(
                f"the recipe does not hold at {', '.join(sorted(lost))} for the call {captured.key}: {why}",
                where=self.name,
                fits="call it as it was optimized, or optimize with these inputs",
            )

    def _whole_model_failed(self, refused: Mapping[str, str]) -> tuple[str, ...]:
        assert self.first is not None
        back = self.first.rolled_back.get("")
        said = (f"whole-model pass refused: {refused['']}",) if "" in refused else ()
        return (*said, f"whole-model passes {back}") if back else said

    def _report(self, raised: Program, steps: Sequence[Step]) -> Report:
        assert self.first is not None
        program = self.first.outcome.program
        refused = self.declined | {step.path: str(refusal) for step, refusal in self.first.outcome.refused}
        whole = self._whole_model_failed(refused)
        passes = () if whole else tuple(repr(s.mechanism) for s in steps if not s.path)
        return Report(
            model=self.name,
            recipe=" + ".join(r.source or r.digest[:8] for r in self.recipes),
            rows=self._rows(raised, steps, refused),
            passes=passes,
            weights=self.moved.lines,
            misses=self.misses,
            output=self.first.deviation,
            captured=self.faithful,
            data=self.described or NO_DATA,
            predicted=(graph_cost(raised.graph), graph_cost(program.graph)),
            warnings=(
                *self.warnings,
                *whole,
                *(f"rewrite of weights refused: {no}" for _, no in self.moved.refused),
            ),
            notes=(*self.notes, *program.notes, *by_torch(self.first.ran)),
            details=Details.of(raised, program, self.recipe),
        )

    def _rows(self, raised: Program, steps: Sequence[Step], refused: Mapping[str, str]) -> tuple[Row, ...]:
        """What became of every site."""
        assert self.first is not None
        program, back = self.first.outcome.program, self.first.rolled_back
        results = {r.path: r for r in self.first.sites}
        rules = {step.path: step.rule for step in steps}
        before, after = site_costs(raised.graph), site_costs(program.graph)
        changes: dict[str, list[Change]] = {}
        for change in program.changes:
            changes.setdefault(change.site.path, []).append(change)
        rows = []
        for site in raised.sites:
            path, rule = site.path, rules.get(site.path, "")
            costs = before.get(path, Cost()), after.get(path, Cost())
            if path in back:
                rows.append(Row(site, "rolled back", reason=back[path], rule=rule))
            elif path in changes:
                rows.append(_row(site, changes[path], results.get(path), costs, rule, refused.get(path, "")))
            elif path in refused:
                rows.append(Row(site, "refused", reason=refused[path], rule=rule))
            else:
                rows.append(Row(site, "kept", before=costs[0], after=costs[1]))
        return tuple(rows)


def _settled(first: Checked) -> Settled:
    refused = {(s.path, s.mechanism.slug) for s, _ in first.outcome.refused if s.mechanism.kind != "exact"}
    return Settled(dict(first.rolled_back), _changed(first.outcome), frozenset(refused))


def _modules_run(captured: Captured, prefix: str) -> frozenset[str]:
    """The modules that a call went through: an encoder is not among them where its outputs are given."""
    stacks = (n.meta.get("nn_module_stack") or {} for n in captured.graph.graph.nodes)
    return frozenset(".".join(filter(None, (prefix, str(path)))) for stack in stacks for path, _ in stack.values())


def _place(path: str) -> str:
    """The module of a site."""
    return path.partition("#")[0]


def _changed(outcome: Outcome) -> dict[str, tuple[str, ...]]:
    """What stands now at each site that computes something else than before."""
    found: dict[str, tuple[str, ...]] = {}
    for change in (c for c in outcome.program.changes if c.mechanism.kind != "exact"):
        found[change.site.path] = (*found.get(change.site.path, ()), repr(change.mechanism))
    return found


def _batch(captured: Captured, like: Call, batch: Batch, number: int) -> tuple[Tensor, ...]:
    """A held-out call's tensors; it must be a call of the kind that was captured."""
    fits = "calls like example_inputs: the same arguments, their sizes free"
    try:
        call = Call.of(like.signature, *batch)
        if call.layouts != captured.layouts:
            names = ", ".join(name for name, _ in call.layouts) or "nothing"
            raise Refused(f"a call with {names}, not tensors as in the captured one", fits=fits)
        tensors = captured.inputs(call)
        captured.check(tensors)
    except Refused as refused:
        raise refused.at(f"data[{number}]") from None
    return tensors


def _called(mechanism: Any) -> str:
    text = repr(mechanism)
    inside = text.partition("(")[2]
    return f"{mechanism.slug}({inside}" if "(" in text and "groups=" not in text else mechanism.slug


def _row(
    site: Site, changes: Sequence[Change], result: SiteResult | None, costs: tuple[Cost, Cost], rule: str, refused: str
) -> Row:
    kinds = [c.mechanism.kind for c in changes]
    return Row(
        site,
        "rewritten",
        mechanism=" + ".join(_called(c.mechanism) for c in changes),
        kind=next(k for k in KINDS[::-1] if k in kinds),
        reason=refused and f"also asked, and refused: {refused}",
        deviation=result.deviation if result else None,
        exact_error=result.exact_error if result else None,
        before=costs[0],
        after=costs[1],
        rule=rule,
        dropped=tuple(sorted({d for c in changes for d in c.dropped})),
        counted=tuple(line for c in changes for line in c.mechanism.explains(site)),
    )


def _half_on_cpu(model: nn.Module) -> tuple[str, ...]:
    half = any(p.dtype == torch.float16 and p.device.type == "cpu" for p in model.parameters())
    return ("float16 on a CPU runs several times slower than bfloat16 or float32",) if half else ()


def model_facts(model: nn.Module) -> Mapping[str, Any]:
    """What a recipe's `model:` guard can ask for."""
    config = getattr(model, "config", None)
    facts: dict[str, Any] = {"class": type(model).__name__}
    for name, attribute in (("type", "model_type"), ("layers", "num_hidden_layers"), ("heads", "num_attention_heads"),
                            ("width", "hidden_size")):  # fmt: skip
        value = getattr(config, attribute, None)
        if value is not None:
            facts[name] = value
    return facts
