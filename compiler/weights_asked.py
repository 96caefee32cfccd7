"""Whether a call asks for the attention weights, and whether an output holds them: never None in their place."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .containers import Layout
from .signature import Call


def weights_asked(model: nn.Module, call: Call) -> bool:
    """By the argument, or by the config where the argument is left out."""
    given = call.values.get("output_attentions")
    return bool(getattr(getattr(model, "config", None), "output_attentions", False) if given is None else given)


def gives_weights(output: Layout) -> bool:
    """Whether weights stand in an output: in a field of that name, and nameless in a tuple without an empty place."""
    named = list(_named(output))
    if named:
        return any(part.count for part in named)
    return not any(_empty(part) for part in output.parts)


def _named(layout: Layout) -> Iterator[Layout]:
    for name, part in zip(layout.names, layout.parts):
        if "attentions" in str(name):
            yield part
    for part in layout.parts:
        yield from _named(part)


def _empty(layout: Layout) -> bool:
    return layout.kind == "items" and (not layout.parts or any(_empty(part) for part in layout.parts))
