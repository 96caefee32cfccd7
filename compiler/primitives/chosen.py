"""`chosen`: every row times the matrices that it has chosen, y[r, s] = x[r] w[which[r, s]], 0 where it chose none."""

from __future__ import annotations

import torch
from torch import Tensor

from ..refusal import Refused
from .operator import Groups, Primitive
from .spec import Spec


def chosen(x: Tensor, which: Tensor, w: Tensor) -> Tensor:
    """(..., K, A) of rows x (..., C), the matrices w (E, C, A), and which (..., K) each row has chosen: -1 for none.

    Work grows with K and not with E where a kernel runs. The gradient of a matrix is that of the rows that chose it.
    """
    if x.ndim < 1 or w.ndim != 3 or x.shape[-1] != w.shape[1] or not x.is_floating_point() or x.dtype != w.dtype:
        found = f"x {tuple(x.shape)} of {x.dtype}, w {tuple(w.shape)} of {w.dtype}"
        raise Refused(found, where="chosen", fits="x (..., C) and w (E, C, A) of one floating type")
    if which.is_floating_point() or which.is_complex() or which.dtype == torch.bool:
        raise Refused(f"choices of {which.dtype}", where="chosen", fits="whole numbers")
    if which.ndim != x.ndim or which.shape[:-1] != x.shape[:-1]:
        found = f"choices of shape {tuple(which.shape)} for x {tuple(x.shape)}"
        raise Refused(found, where="chosen", fits="(..., K), before K as x is before C")
    rows = [t.reshape(-1, t.shape[-1]) if t.ndim != 2 else t for t in (x, which)]
    y = chosen_op(*rows, w, Spec().text)[0]
    return y.view(*x.shape[:-1], *y.shape[1:])


def chosen_meaning(groups: Groups, text: str) -> list[Tensor]:
    """All matrices, of which each row keeps its own: E / K times the work, and no size that depends on numbers."""
    (x,), (which,), (w,) = groups
    there = is_choice(which, w)
    every = torch.einsum("rc,eca->rea", x, w)
    own = every.gather(1, torch.where(there, which, 0).long()[..., None].expand(*which.shape, w.shape[2]))
    return [torch.where(there[..., None], own, 0.0)]


def chosen_shapes(groups: Groups, text: str) -> list[Tensor]:
    (x,), (which,), (w,) = groups
    return [x.new_empty(*which.shape, w.shape[2])]


def is_choice(which: Tensor, w: Tensor) -> Tensor:
    return (which >= 0) & (which < w.shape[0])


chosen_op = Primitive("chosen", ("x", "which", "w"), chosen_meaning, chosen_shapes)
