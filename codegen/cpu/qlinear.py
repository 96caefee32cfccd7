"""`qlinear` by torch's own kernels: products of whole numbers, of numbers with bytes, or with weights made whole again.

Which one a call gets is a rule of its number of rows, measured by `benchmarks/quantized_linear.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...compiler.doctor import cpu_flags
from ...compiler.primitives.operator import Groups
from ...compiler.primitives.qlinear import rounded_rows
from ...compiler.primitives.qlinear_spec import QLinearSpec, dequantized, whole_weights

_FEW = 4 if "avx512f" in cpu_flags() else 12  # rows up to which bytes read once are worth more than wide products
_FLOATS = (torch.float32, torch.bfloat16)


def no_bytes(groups: Groups, text: str) -> str | None:
    """Why a call is not handed to the product of numbers with bytes."""
    (x,), tensors = groups
    spec = QLinearSpec.of(text)
    if spec.format != "int8" or spec.activations:
        return "weights of 8 bits alone"
    if x.dtype not in _FLOATS:
        return f"{x.dtype}"
    rows = x.numel() // max(spec.inputs, 1)
    return f"{rows} rows" if not 0 < rows <= _FEW or spec.inputs % 32 or tensors[0].shape[0] % 16 else None


def by_bytes(groups: Groups, text: str) -> list[Tensor]:
    (x,), tensors = groups
    spec = QLinearSpec.of(text)
    flat = x.reshape(-1, spec.inputs).contiguous()
    one = torch.ones(tensors[0].shape[0], dtype=x.dtype)  # a scale in bfloat16 would round every weight once more
    y = torch.ops.aten._weight_int8pack_mm(flat, tensors[0], one).float() * tensors[1]
    return [_finished(y, x, tensors, spec)]


def no_whole(groups: Groups, text: str) -> str | None:
    """Why a call is not handed to the product of whole numbers."""
    (x,), tensors = groups
    spec = QLinearSpec.of(text)
    if spec.format == "int4" or not spec.activations:
        return "weights and activations of 8 bits"
    if x.dtype not in _FLOATS or not x.numel():
        return f"{x.numel()} numbers of {x.dtype}"
    return f"{spec.inputs} x {tensors[0].shape[0]}" if spec.inputs % 16 or tensors[0].shape[0] % 16 else None


def by_whole(groups: Groups, text: str) -> list[Tensor]:
    (x,), tensors = groups
    spec = QLinearSpec.of(text)
    whole, scale = rounded_rows(x.reshape(-1, spec.inputs).float(), tensors[1].dtype)
    codes = whole_weights(tensors, spec, torch.int8)  # what passes 127 on the way comes back
    y = torch._int_mm(whole.to(torch.int8), codes.t())  # the view: a contiguous transpose is three times slower
    return [_finished(y * (scale * tensors[1]), x, tensors, spec)]


def no_numbers(groups: Groups, text: str) -> str | None:
    (x,), _ = groups
    return None if x.dtype in (*_FLOATS, torch.float16) else f"{x.dtype}"


def by_numbers(groups: Groups, text: str) -> list[Tensor]:
    """Weights made whole again, in the type of x, for this call alone."""
    (x,), tensors = groups
    spec = QLinearSpec.of(text)
    if spec.format == "int8" and not spec.activations:  # whole numbers are whole in every type: ten times as fast
        y = torch.nn.functional.linear(x, tensors[0].to(x.dtype)).float() * tensors[1]
        return [_finished(y, x, tensors, spec)]
    weights = dequantized(tensors, spec, torch.float32).to(x.dtype)
    if not spec.activations:
        y = torch.nn.functional.linear(x, weights)
    else:
        whole, scale = rounded_rows(x.float(), tensors[1].dtype)
        y = torch.nn.functional.linear(whole, weights.float()) * scale
    return [_finished(y, x, tensors, spec)]


def _finished(y: Tensor, x: Tensor, tensors: Sequence[Tensor], spec: QLinearSpec) -> Tensor:
    y = y + tensors[-1] if spec.bias else y
    return y.to(x.dtype).view(*x.shape[:-1], tensors[0].shape[0])
