"""A model rewritten as a whole; where that cannot be captured, or computes something else, in islands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .account import attending_islands, some_found, told
from .giving_way import ours, say
from .hosted import host
from .islands import host_islands
from .refusal import Refused, Uncapturable
from .report import SiteList, joined
from .rewriting import Rewriting
from .trial import must_run
from .untouched import same_statistics


def rewritten(inner: nn.Module, work: Rewriting, args: Any, kwargs: Any, limit: int) -> Any:
    """The model hosted over its rewritten graph; grad mode is left as it was, also where capturing fails."""
    grad = torch.is_grad_enabled()
    try:
        fast: Any = host(inner, work.program_for, about=work, limit=limit)
        ours(fast, "prepare")(*args, **kwargs)
        return _nearer(inner, work, fast, args, kwargs, limit) if work.unfaithful else fast
    except Uncapturable as whole:
        must_run(inner, args, kwargs)
        return _in_islands(inner, work, whole, args, kwargs, limit)
    finally:
        torch.set_grad_enabled(grad)


def _in_islands(
    model: nn.Module,
    work: Rewriting,
    whole: Uncapturable,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    limit: int,
) -> Any:
    """The model with its largest capturable parts rewritten in place; the report says which, and why not the whole."""
    islands = some_found(attending_islands(model, args, kwargs), whole)
    paths = list(islands.found)
    parts = {path: Rewriting(work.recipes, work.name, path, notes=[f"an island at {path}"]) for path in paths}
    fast: Any = host_islands(model, paths, lambda path: parts[path].program_for, limit=limit)
    with torch.no_grad(), same_statistics(fast):
        fast(*args, **kwargs)
    work.unfaithful = next((part.unfaithful for part in parts.values() if part.unfaithful), "")
    report = joined([part.report for part in parts.values() if part.report is not None])
    report.misses = (*report.misses, *islands.misses)
    report.notes = (*told(islands, whole), *work.notes, *report.notes)
    say(fast, {"report": report, "sites": SiteList(report.rows)})
    return fast


def _nearer(
    model: nn.Module, work: Rewriting, fast: Any, args: Sequence[Any], kwargs: Mapping[str, Any], limit: int
) -> Any:
    """Islands where these are the model's and the whole graph is not: some models build other masks while traced."""
    whole = Uncapturable(work.unfaithful, where=work.name, fits="a model that computes the same while it is traced")
    try:
        parts = _in_islands(model, work, whole, args, kwargs, limit)
    except Refused as refused:
        report = ours(fast, "report")
        report.notes = (*report.notes, f"not in islands either: {refused}")
        return fast
    return fast if work.unfaithful else parts
