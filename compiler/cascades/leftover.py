"""What a scan leaves for the keys behind it: where that bounds all of their weights, a walk along it may end early.

    w_j = exp(s_j - X_j),   X_j = sum of u(s_t) over the keys from the first one walked up to j

If u >= 0 and exp(s - u) + exp(-u) <= 1, a key takes at most exp(s - u) of exp(-X) and leaves the rest: the weights of
all keys behind j sum to at most exp(-X_j), whatever their scores.

>>> leftover('{"score": "s", "normaliser": "stick"}'), leftover('{"score": "s"}')
(True, False)
"""

from __future__ import annotations

from functools import lru_cache

import torch

from ..primitives.attend_spec import AttendSpec
from ..refusal import Refused
from ..symbol_eval import evaluate
from ..symbol_slope import slope
from ..symbols import Expr, build, name
from .einsum import Cascade, Node
from .of_mechanism import cascade_of_spec

_SCORES = torch.linspace(-700, 20, 72001, dtype=torch.float64)  # from 20 on torch's softplus is the score itself


@lru_cache(maxsize=64)
def leftover(text: str) -> bool:
    """Whether what the scan of a spec has left bounds all weights that are still to come."""
    spec = AttendSpec.of(text)
    try:
        found = cascade_of_spec(AttendSpec("s", weight=spec.weight, normaliser=spec.normaliser).text)
    except Refused:
        return False
    scans = [n for n in found.cascade.nodes if n.kind == "scan" and set(n.over) & set(found.keys)]
    if len(scans) != 1 or scans[0].monoid != "sum" or scans[0].decay or scans[0].init:
        return False
    return _bounded(_of_score(found.cascade, scans[0].expr), _of_score(found.cascade, _weight(found.cascade)))


def _weight(cascade: Cascade) -> Expr:
    """The weight that meets the values in the first output."""
    values = cascade.by_name[cascade.outputs[0]].expr
    return next(a for a in values.args if isinstance(a, Expr) and a.text in cascade.by_name)


def _of_score(cascade: Cascade, e: Expr) -> Expr:
    """An expression in terms of a key's score s and of the scan X up to it."""
    while inner := {w: _one(cascade.by_name[w]) for w in e.names if w in cascade.by_name}:
        e = e.replace(inner)
    return e


def _one(node: Node) -> Expr:
    return name("X") if node.kind == "scan" else name("s") if node.kind == "reduce" else node.expr


def _bounded(added: Expr, weight: Expr) -> bool:
    """Asked at many scores: an identity of a function and its exponential is not one that expressions show."""
    if weight.names != {"s", "X"} or slope(weight, "X").text != build("mul", weight, -1).text:
        return False
    u = evaluate(added, {"s": _SCORES}, {})
    share = evaluate(weight, {"s": _SCORES, "X": u}, {})  # of what the keys before it have left
    return bool((u >= 0).all() and (share + torch.exp(-u) <= 1 + 1e-12).all())
