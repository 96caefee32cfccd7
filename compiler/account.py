"""What became of every part of a model that cannot be captured whole: where it attends, what comes near, what is left.

Where a model attends in none of its parts, the account is all that there is to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .capture import Captured
from .islands import Islands, capture_islands
from .pipeline import shown_misses
from .raising import raise_sites
from .refusal import Refused, Uncapturable


def attending_islands(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Islands:
    """The parts with attention that can be captured, and what became of the others."""
    return capture_islands(model, args, kwargs, _attention_lacking)


def told(islands: Islands, whole: Uncapturable) -> tuple[str, ...]:
    """Why the whole was not captured, and which parts are left as they are."""
    count = len(islands.found)
    said = f"captured in {count} islands, not whole" if count else "not captured whole, and no part of it attends"
    return (f"{said}: {whole}", *islands.left_out())


def some_found(islands: Islands, whole: Uncapturable) -> Islands:
    """The same islands; Refused with what comes nearest where there are none."""
    if islands.found:
        return islands
    what = "no attention found in what can be captured of it" if islands.near else "no part of it can be captured"
    near = [f"{path}.{every[0]}" for path, every in islands.near.items()]
    said = [*near, *(f"{path}: {why}" for path, why in islands.refused.items())]
    more = f"; {len(said) - 3} more places: reattend.explain(model, inputs)" if len(said) > 3 else ""
    why = f" ({'; '.join(said[:3])}{more})" if said else ""
    raise Refused(f"{whole.found}; {what}{why}", where=whole.where, fits=whole.fits)


def _attention_lacking(captured: Captured) -> tuple[str, ...] | None:
    raised = raise_sites(captured.graph)
    return None if raised.nodes else shown_misses(raised.misses)
