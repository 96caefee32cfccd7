"""`qlinear`: a linear layer whose weights are stored as 8 or 4 bits, and whose inputs may be rounded to 8 bits a token.

    y = x W^T + b,   W = the stored codes, scales and zeros

With activations "int8" every row of x is rounded to whole numbers times one scale of its own, found at run time:

    s_t = max |x_t| / 127,   y_t = s_t (round(x_t / s_t) . W^T) + b

The scale of a row is rounded to the type that the weights' scales are stored in. Only x and the bias have gradients:
codes cannot move, and rounding x counts as the identity.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..refusal import Refused, nearest
from .operator import Groups, Primitive
from .qlinear_spec import ACTIVATIONS, FORMATS, QLinearSpec, dequantized
from .rows import widened


def qlinear(x: Tensor, tensors: Sequence[Tensor], spec: QLinearSpec) -> Tensor:
    """x (..., K) to (..., N) in the type of x; `tensors` as the spec's format names them, the bias last."""
    _check(x, tensors, spec)
    result: Tensor = qlinear_op(x, list(tensors), spec.text)[0]
    return result


def rounded_rows(x: Tensor, like: torch.dtype) -> tuple[Tensor, Tensor]:
    """Whole numbers -127..127 (..., K) and the scale (..., 1) of each row; a row of zeros has scale 1."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    if like.itemsize < 4:
        scale = scale.clamp(max=torch.finfo(like).max).to(like).to(x.dtype)
    scale = torch.where(scale == 0, 1.0, scale)
    return (x / scale).round().clamp(-127, 127), scale


def qlinear_meaning(groups: Groups, text: str) -> list[Tensor]:
    (x,), tensors = groups
    spec = QLinearSpec.of(text)
    wide = widened(x)
    weights = dequantized(tensors, spec)
    with torch.no_grad():
        whole, scale = rounded_rows(wide, tensors[1].dtype) if spec.activations else (wide, None)
        y = whole.double() @ weights.T
        y = (y if scale is None else y * scale.double()).to(wide.dtype)
    if torch.is_grad_enabled() and x.requires_grad:
        through = wide @ weights.to(wide.dtype).T
        y = y + (through - through.detach())
    return [(y + tensors[-1].to(wide.dtype) if spec.bias else y).to(x.dtype)]


def qlinear_shapes(groups: Groups, text: str) -> list[Tensor]:
    (x,), tensors = groups
    return [x.new_empty(*x.shape[:-1], tensors[0].shape[0])]


qlinear_op = Primitive("qlinear", ("x", "tensors*"), qlinear_meaning, qlinear_shapes)


def _check(x: Tensor, tensors: Sequence[Tensor], spec: QLinearSpec) -> None:
    if spec.format not in FORMATS:
        raise Refused(f"format {spec.format!r}", where="qlinear", fits=nearest(spec.format, FORMATS))
    if spec.activations not in ACTIVATIONS:
        raise Refused(f"activations {spec.activations!r}", where="qlinear", fits="int8, or none")
    if spec.group and spec.inputs % spec.group:
        fits = f"a divisor of {spec.inputs}"
        raise Refused(f"groups of {spec.group} of {spec.inputs} inputs", where="qlinear", fits=fits)
    if len(tensors) != len(spec.names):
        raise Refused(f"{len(tensors)} tensors", where="qlinear", fits=", ".join(spec.names))
    if x.shape[-1] != spec.inputs or not x.is_floating_point():
        found = f"x {tuple(x.shape)} of {x.dtype}"
        raise Refused(found, where="qlinear", fits=f"floating point rows of {spec.inputs}")
