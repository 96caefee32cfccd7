"""From a recipe and the sites it meets to the steps that are taken, in the order of their stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .decisions import Decided, Decisions, decide
from .mechanism import Mechanism, mechanism, mechanisms
from .pipeline import Step
from .quantize import QuantizeLayers, Scheme
from .recipe import KEEP, Choice, Keep, Recipe, Split
from .refusal import Refused
from .site import Site
from .split import Split as SplitCore
from .vocabulary import Knob, MechanismFacts, Vocabulary

PLACED = ("core", "gate", "region")  # parts of what stands in a site's own place


def vocabulary() -> Vocabulary:
    """The words that recipes may use now: every registered mechanism with its knobs."""
    return Vocabulary(
        {
            slug: MechanismFacts(
                slug,
                cls.part,
                {n: Knob(kind, default) for n, (kind, default) in cls.knobs().items()},
                stage=cls.stage,
                doc=cls.summary(),
                make=cls,
            )
            for slug, cls in mechanisms().items()
        }
    )


def steps_of(recipe: Recipe, sites: Sequence[Site]) -> tuple[list[Step], Decisions]:
    """One step per decided key and site, then the whole-model passes; `keep` decides that nothing happens."""
    decisions = decide(recipe, sites)
    by_path = {site.path: site for site in sites}
    steps = [
        Step(decision.path, chosen, one.drop, one.where)
        for decision in decisions
        for one in decision.decided
        if not one.refused and (chosen := _chosen(one, by_path[decision.path])) is not None
    ]
    steps += [Step("", mechanism(choice.mechanism, **choice.settings), rule="passes") for choice in recipe.passes]
    if any(choice != KEEP for _, choice in recipe.quantize):
        chosen_for = tuple((pattern, _scheme(choice)) for pattern, choice in recipe.quantize)
        steps.append(Step("", QuantizeLayers(chosen_for), rule="quantize"))
    return steps, decisions


def _scheme(choice: Choice | Keep) -> Scheme | None:
    if isinstance(choice, Keep):
        return None
    found = mechanism(choice.mechanism, **choice.settings)
    assert isinstance(found, Scheme)  # the vocabulary gives `quantize` no others
    return found


def _chosen(one: Decided, site: Site) -> Mechanism | None:
    wish: Any = one.wish
    if isinstance(wish, Keep):
        return None
    if isinstance(wish, Split):
        groups = tuple((heads, _core(choice)) for heads, choice in wish.over(site.heads, site.kv_heads))
        return SplitCore(groups)
    return _core(wish)


def _core(choice: Choice | Keep) -> Mechanism:
    """The mechanism of a choice; `keep` inside a split is the attention that stands there."""
    return mechanism("softmax") if isinstance(choice, Keep) else mechanism(choice.mechanism, **choice.settings)


def analyses(site: Site) -> tuple[str, ...]:
    """What mechanisms that fit a site say of themselves there, with their default knobs."""
    return tuple(f"{slug}: {line}" for slug in fitting(site) for line in mechanisms()[slug]().explains(site))


def fitting(site: Site) -> tuple[str, ...]:
    """Names of mechanisms that can stand at a site with their default knobs."""
    found = []
    for slug, cls in mechanisms().items():
        if cls.part not in PLACED:
            continue
        try:
            reason = cls().refuses(site)
        except (Refused, TypeError):
            continue
        if reason is None:
            found.append(slug)
    return tuple(found)
