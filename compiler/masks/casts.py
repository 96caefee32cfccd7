"""Values in another dtype: what a cast makes of an element, refused where it could round."""

from __future__ import annotations

import math

import torch

from ..symbols import Expr, const
from .arithmetic import choose, is_plain_choice, number, truth
from .frame import Unreadable


def cast(e: Expr, old: torch.dtype, new: torch.dtype) -> Expr:
    """The value in another dtype."""
    if new == torch.bool:
        return truth(e)
    if e.op == "const" and not new.is_floating_point and float(e.args[0]).is_integer():
        return cast(const(int(e.args[0])), torch.int64, new) if isinstance(e.args[0], float) else _narrowed(e, new)
    if new.is_floating_point and e.op == "const":
        exact = float(torch.tensor(float(e.args[0]), dtype=new))
        return const(-math.inf if new == torch.float16 and exact <= -65504.0 else exact)
    if old == torch.bool:
        return number(e, 1.0 if new.is_floating_point else 1, 0.0 if new.is_floating_point else 0)
    if new.is_floating_point and old.is_floating_point and e.op == "where":
        return choose(e.args[0], cast(e.args[1], old, new), cast(e.args[2], old, new))
    wider = new in (torch.float32, torch.float64) and (e.is_integer or old in (torch.float16, torch.bfloat16))
    if old == new or wider:
        return e
    if is_plain_choice(e):
        return choose(e.args[0], cast(e.args[1], old, new), cast(e.args[2], old, new))
    if not new.is_floating_point and not old.is_floating_point:
        if new.itemsize >= 4:
            return e
        if e.op == "where" and all(a.op == "const" and a.args[0] in (0, 1) for a in e.args[1:]):
            return e
    raise Unreadable(f"cast from {old} to {new}")


def _narrowed(e: Expr, new: torch.dtype) -> Expr:
    if not torch.iinfo(new).min <= e.args[0] <= torch.iinfo(new).max:
        raise Unreadable(f"{e.text} as {new}")
    return e


def rounded(e: Expr, kind: torch.dtype) -> Expr:
    """Sums of constants as the graph's dtype holds them: two lowest finite values add up to -inf."""
    if not kind.is_floating_point:
        return e
    if e.op == "const":
        return cast(e, kind, kind)
    if e.op == "where":
        return choose(e.args[0], rounded(e.args[1], kind), rounded(e.args[2], kind))
    return e
