"""`route`: the K best of each row of scores, the lowest index first among equals, -1 where there are fewer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..refusal import Refused
from .operator import Groups, Primitive
from .spec import Spec


@dataclass(frozen=True)
class RouteSpec(Spec):
    k: int


def route(scores: Tensor, k: int, *, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(indices, values) (..., k) of the k largest scores (..., M), in descending order and the same on every device.

    valid (broadcasts to the scores) leaves candidates out, as does a score of -inf; where fewer than k are left the
    index is -1 and the value -inf. The gradient of a value is that of the score that it is.
    """
    if scores.ndim < 1 or not scores.is_floating_point():
        raise Refused(
            f"scores of shape {tuple(scores.shape)} and {scores.dtype}", where="route", fits="floats (..., M)"
        )
    if k < 1:
        raise Refused(f"k={k}", where="route", fits="at least 1")
    if valid is not None and (
        valid.ndim > scores.ndim
        or any(a not in (1, b) for a, b in zip(valid.shape[::-1], scores.shape[::-1], strict=False))
    ):
        found = f"valid of shape {tuple(valid.shape)}"
        raise Refused(found, where="route", fits=f"what broadcasts to {tuple(scores.shape)}")
    values, indices = route_op(scores, [] if valid is None else [valid], RouteSpec(int(k)).text)
    return indices, values


def route_meaning(groups: Groups, text: str) -> list[Tensor]:
    (scores,), valid = groups
    k = RouteSpec.of(text).k
    for flags in valid:
        scores = scores.masked_fill(flags == 0, -math.inf)
    order = scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    values = scores.gather(-1, order)
    missing = k - order.shape[-1]
    indices = torch.where(values > -math.inf, order, -1)
    pad = torch.nn.functional.pad
    return [pad(values, (0, missing), value=-math.inf), pad(indices, (0, missing), value=-1)]


def route_shapes(groups: Groups, text: str) -> list[Tensor]:
    scores, k = groups[0][0], RouteSpec.of(text).k
    return [scores.new_empty(*scores.shape[:-1], k), scores.new_empty(*scores.shape[:-1], k, dtype=torch.long)]


route_op = Primitive("route", ("scores", "tables*"), route_meaning, route_shapes)
