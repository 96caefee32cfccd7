"""`prefix`: what all rows up to each one combine to, for any associative way of combining two stretches of rows.

    sum      y_t = y_{t-1} + x_t
    max      y_t = max(y_{t-1}, x_t)
    affine   y_t = a_t * y_{t-1} + x_t
    softmax  o_t = sum_{s <= t} exp(l_s) v_s / sum_{s <= t} exp(l_s), and the logarithm of that sum

Stretches double in log2(N) steps: nothing is divided by a running product or subtracted from a running sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..refusal import Refused, nearest
from .operator import Groups, Primitive
from .prefix_spec import MONOIDS, PrefixSpec
from .scan_meaning import in_order
from .tables import Tables

Element = tuple[Tensor, ...]  # one per row, each (B, H, N, D) or (B, H, N, 1)


def prefix(
    monoid: str,
    *x: Tensor,
    reset: Tensor | None = None,
    reverse: bool = False,
    state: Sequence[Tensor] | None = None,
) -> Any:
    """The prefixes of rows (B, H, N, D): one tensor, for softmax the pair (o, lse).

    x         sum, max: x. affine: a (B, H, N, D|1), x. softmax: logits (B, H, N), v (B, H, N, D).
    reset     ids of documents (N,) or (B, N): prefixes start anew where they change.
    reverse   combines from the last row backwards.
    state     what came before the first row, one row of what `prefix` returned: (y,) with y (B, H, 1, D), for softmax
              (o, lse) with lse (B, H, 1); after the last row where reversed.
    """
    _check(monoid, x, reset)
    rows = x if state is None else _with_state(monoid, x, state, reverse)
    if reset is not None and state is not None:
        edge = reset[..., -1:] if reverse else reset[..., :1]
        reset = torch.cat((reset, edge) if reverse else (edge, reset), -1)
    tables = Tables()
    spec = PrefixSpec(monoid, reverse, tables.name_of(reset))
    found = prefix_op(list(rows), tables.tensors, spec.text)
    if state is not None:
        found = [t[:, :, :-1] if reverse else t[:, :, 1:] for t in found]
    return found[0] if len(found) == 1 else tuple(found)


def _with_state(monoid: str, x: Sequence[Tensor], state: Sequence[Tensor], reverse: bool) -> list[Tensor]:
    """The rows with what came before as one more: every monoid's result is itself an element."""
    if len(state) != (2 if monoid == "softmax" else 1):
        raise Refused(f"a state of {len(state)} tensors", where="prefix", fits="what prefix returned, one row of it")
    if monoid == "softmax":
        first: list[Tensor] = [state[1], state[0]]
    elif monoid == "affine":
        first = [torch.zeros_like(x[0][:, :, :1]), state[0]]
    else:
        first = [state[0]]
    pairs = zip(first, x, strict=True)
    return [torch.cat((row, edge.to(row.dtype)) if reverse else (edge.to(row.dtype), row), 2) for edge, row in pairs]


def _check(monoid: str, x: Sequence[Tensor], reset: Tensor | None) -> None:
    if monoid not in MONOIDS:
        raise Refused(f"monoid {monoid!r}", where="prefix", fits=nearest(monoid, MONOIDS))
    if len(x) != MONOIDS[monoid]:
        raise Refused(f"{len(x)} tensors", where=f"prefix {monoid}", fits=f"{MONOIDS[monoid]}")
    dims = [t.ndim for t in x]
    if dims != ([3, 4] if monoid == "softmax" else [4] * len(x)):
        raise Refused(f"tensors of {dims} dimensions", where=f"prefix {monoid}", fits="rows (B, H, N, D)")
    if len(x) == 2 and x[0].shape[:3] != x[1].shape[:3]:
        raise Refused(f"{tuple(x[0].shape)} and {tuple(x[1].shape)}", where=f"prefix {monoid}", fits="the same rows")
    if monoid == "affine" and x[0].shape[3] not in (1, x[1].shape[3]):
        raise Refused(f"factors of D={x[0].shape[3]}", where="prefix affine", fits=f"1 or {x[1].shape[3]}")
    if reset is not None and reset.ndim not in (1, 2):
        raise Refused(f"reset of shape {tuple(reset.shape)}", where="prefix", fits="(N,) or (B, N)")


def prefix_meaning(groups: Groups, text: str) -> list[Tensor]:
    rows, table_list = groups
    spec = PrefixSpec.of(text)
    kind = torch.promote_types(rows[-1].dtype, torch.float32)
    x = [t.to(kind) for t in rows]
    document = in_order(table_list[int(spec.documents[1:])])[..., None] if spec.documents else None
    if spec.reverse:
        x = [t.flip(2) for t in x]
        document = None if document is None else document.flip(2)
    lift, combine, lower = _MONOIDS[spec.monoid]
    found = lower(_doubled(lift(x), combine, document))
    if spec.reverse:
        found = [t.flip(2) for t in found]
    return [t if t.ndim == 3 else t.to(rows[-1].dtype) for t in found]


def _doubled(element: Element, combine: Callable[[Element, Element], Element], document: Tensor | None) -> Element:
    """After k rounds a row stands for the 2^k rows that end with it, or for those of its document."""
    n, reach = element[0].shape[2], 1
    while reach < n:
        early, late = tuple(t[:, :, :-reach] for t in element), tuple(t[:, :, reach:] for t in element)
        joined = combine(early, late)
        if document is not None:
            same = document[:, :, reach:] == document[:, :, :-reach]
            joined = tuple(torch.where(same, a, b) for a, b in zip(joined, late, strict=True))
        element = tuple(torch.cat((t[:, :, :reach], j), 2) for t, j in zip(element, joined, strict=True))
        reach *= 2
    return element


def _affine(early: Element, late: Element) -> Element:
    return early[0] * late[0], late[0] * early[1] + late[1]


def _lift_softmax(x: Sequence[Tensor]) -> Element:
    """(running max, sum, weighted sum) of one row; the max is a constant, its gradient is 0."""
    logits, v = x[0][..., None], x[1]
    top = logits.detach()
    mass = torch.exp(logits - torch.where(torch.isfinite(top), top, 0.0))
    return top, mass, mass * v


def _softmax(early: Element, late: Element) -> Element:
    top = torch.maximum(early[0], late[0])
    calm = torch.where(torch.isfinite(top), top, 0.0)
    a, b = torch.exp(early[0] - calm), torch.exp(late[0] - calm)
    return top, a * early[1] + b * late[1], a * early[2] + b * late[2]


def _lower_softmax(element: Element) -> list[Tensor]:
    top, mass, total = element
    some = mass > 0
    safe = torch.where(some, mass, 1.0)
    return [total / safe, torch.where(some, top + torch.log(safe), -math.inf).squeeze(-1)]


_MONOIDS: dict[str, tuple[Callable[..., Element], Callable[..., Element], Callable[..., list[Tensor]]]] = {
    "sum": (tuple, lambda early, late: (early[0] + late[0],), list),
    "max": (tuple, lambda early, late: (torch.maximum(early[0], late[0]),), list),
    "affine": (tuple, _affine, lambda element: [element[1]]),
    "softmax": (_lift_softmax, _softmax, _lower_softmax),
}


def prefix_shapes(groups: Groups, text: str) -> list[Tensor]:
    rows, _ = groups
    found = [torch.empty_like(rows[-1], memory_format=torch.contiguous_format)]
    if PrefixSpec.of(text).monoid == "softmax":
        kind = torch.promote_types(rows[-1].dtype, torch.float32)
        found.append(rows[0].new_empty(rows[0].shape, dtype=kind))
    return found


prefix_op = Primitive("prefix", ("xs*", "tables*"), prefix_meaning, prefix_shapes)
