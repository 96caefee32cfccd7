"""A model as it stands, explained: captured and raised, and nothing changed; in islands where it has to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .account import attending_islands, told
from .capture import Captured, capture
from .cascades.of_mechanism import spec_math
from .cost import site_costs
from .explanation import Explanation, together
from .facts import describe
from .masks import fold_masks
from .pipeline import shown_misses
from .raising import raise_sites
from .refusal import Refused, Uncapturable
from .steps import analyses, fitting
from .trial import must_run


def explained(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], notes: tuple[str, ...] = ()
) -> Explanation:
    """What there is to say of a model on a call; `notes` come first."""
    try:
        return _captured(capture(model, tuple(args), dict(kwargs)), notes)
    except Uncapturable as whole:
        must_run(model, args, kwargs)
        islands = attending_islands(model, args, kwargs)
        parts = [_captured(captured, (), path) for path, captured in islands.found.items()]
        return together(parts, misses=islands.misses, notes=(*notes, *told(islands, whole)))


def _captured(captured: Captured, notes: tuple[str, ...], prefix: str = "") -> Explanation:
    raised = raise_sites(captured.graph)
    masks = fold_masks(captured.graph)
    found, ports = describe(captured.graph, prefix)
    costs = site_costs(captured.graph)
    return Explanation(
        sites=found,
        misses=shown_misses(raised.misses, prefix),
        masks=masks,
        specs=tuple(str(ports[s.path].attend.args[3]) for s in found),
        costs=tuple(costs[s.path] for s in found),
        fits=tuple(fitting(s) for s in found),
        analyses=tuple(analyses(s) for s in found),
        notes=(*notes, *captured.notes),
    )


def math_of_sites(found: Explanation, path: str = "") -> dict[str, str]:
    """The cascade at each site, or at one; sites of one spec are told once."""
    told: dict[str, str] = {}
    for site, spec in zip(found.sites, found.specs, strict=True):
        if path in ("", site.path):
            told[spec] = f"{told[spec]}, {site.path}" if spec in told else site.path
    if not told:
        raise Refused(f"site {path!r}", fits=", ".join(s.path for s in found.sites) or "this model has none")
    return {paths: spec_math(spec) for spec, paths in told.items()}
