"""Where a model cannot be captured: does it run on the inputs at all? If not, its own error is the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .containers import copied
from .refusal import Refused
from .signature import forward_signature
from .untouched import unchanged


def must_run(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise Refused with the model's own error where it does not run on the example inputs."""
    given, named = copied((tuple(args), dict(kwargs)))  # a model may write to them
    try:
        with torch.no_grad(), unchanged(model), torch.random.fork_rng(devices=[]):
            model(*given, **named)
    except Exception as error:  # whatever the user's own code raises is the answer
        found = f"the model does not run on {_shown(args, kwargs)}: {_first_line(error)}"
        fits = f"example_inputs for forward{forward_signature(model)}"
        raise Refused(found, where=type(model).__name__, fits=fits) from None


def graph_alone_fails(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], error: Exception
) -> Refused | None:
    """What to say of a graph that fails on a call on which the model itself runs; None where that fails as well."""
    try:
        must_run(model, args, kwargs)
    except Refused:
        return None
    found = f"its graph fails on {_shown(args, kwargs)}: {_first_line(error)}; the model itself runs on them"
    return Refused(found, where=type(model).__name__, fits="optimize with these as example_inputs")


def _first_line(error: Exception) -> str:
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:200]
    return f"{type(error).__name__}: {said}"


def _shown(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    parts = [_one(value) for value in args] + [f"{name}={_one(value)}" for name, value in kwargs.items()]
    return ", ".join(parts) or "no arguments"


def _one(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 40 else f"a {type(value).__name__}"
