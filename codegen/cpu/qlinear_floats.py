"""`qlinear` by generated C++ in float32: few rows meet codes in registers, more rows meet panels of unpacked codes.

What a processor with products of bytes does better is left to them (qlinear_units.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from ...compiler.primitives.operator import Groups
from ...compiler.primitives.qlinear import rounded_rows
from ...compiler.primitives.qlinear_spec import QLinearSpec
from . import qlinear_units
from .memory import pointer
from .qlinear import by_numbers
from .qlinear_call import CODES, LEAST, TYPES, call_of, odd
from .skeleton import skeleton
from .toolchain import built

FEW = 4  # rows up to which vectors are faster than units; measured
_FEWER = 2  # the same where units take bfloat16 apart, or torch's product with bytes is there


def few_rows(codes: str, scales: str) -> str:
    """The whole C++ text for few rows, by a way of storing weights and the type of their scales."""
    return _text("qlinear_few.cpp", codes, scales)


def panels(codes: str, scales: str) -> str:
    """The same for any number of rows."""
    return _text("qlinear_panels.cpp", codes, scales)


def _text(name: str, codes: str, scales: str) -> str:
    return skeleton("qlinear_codes.hpp", name, said=[f"#define CODES {codes}", f"#define SCALES {scales}"])


def refuses_few(groups: Groups, text: str) -> str | None:
    """Why a call is not made of few rows, or better left to products of bytes."""
    (x,), tensors = groups
    spec = QLinearSpec.of(text)
    rows = x.numel() // max(spec.inputs, 1)
    if not 0 < rows <= FEW:
        return f"{rows} rows"
    wide = bool(qlinear_units.road()) or rows > _FEWER
    if wide and spec.format == "int8" and x.dtype == torch.bfloat16 and not spec.activations:
        return "bfloat16 with bytes"
    if tensors[0].shape[0] * spec.inputs < LEAST:
        return "few weights"
    many = rows > _FEWER or qlinear_units.road() == "dots"
    if (spec.activations or (many and x.dtype == torch.bfloat16)) and qlinear_units.refuses(groups, text) is None:
        return f"{rows} rows of {'whole numbers' if spec.activations else 'bfloat16'}"
    return no_few(groups, text) or built(few_rows, *_said(groups, text))[1]


def refuses_panels(groups: Groups, text: str) -> str | None:
    """Why a call is not handed to panels: nothing would be gained, or it cannot be."""
    (x,), tensors = groups
    if x.numel() == 0 or tensors[0].shape[0] * QLinearSpec.of(text).inputs < LEAST:
        return "few weights"
    return no_panels(groups, text) or built(panels, *_said(groups, text))[1]


def no_few(groups: Groups, text: str) -> str | None:
    """Why the skeleton for few rows cannot say a call, whatever it would gain."""
    (x,), tensors = groups
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"{x.dtype}"
    return odd(tensors, QLinearSpec.of(text))


def no_panels(groups: Groups, text: str) -> str | None:
    """The same for panels, which hold whole groups."""
    spec = QLinearSpec.of(text)
    return no_few(groups, text) or (f"groups of {spec.group}" if spec.group % 32 else None)


def run_few(groups: Groups, text: str) -> list[Tensor]:
    return _run(few_rows, groups, text)


def run_panels(groups: Groups, text: str) -> list[Tensor]:
    return _run(panels, groups, text)


def _run(source: Callable[[str, str], str], groups: Groups, text: str) -> list[Tensor]:
    (x,), tensors = groups
    spec = QLinearSpec.of(text)
    rows, scale = x.reshape(-1, spec.inputs).float().contiguous(), None
    if spec.activations:
        rows, scale = rounded_rows(rows, tensors[1].dtype)
        rows, scale = rows.float().contiguous(), scale.float().contiguous()
    y = torch.empty(rows.shape[0], tensors[0].shape[0])
    call = call_of(rows, dict(zip(spec.names, tensors)), y, spec)
    bias = tensors[-1].float() if spec.bias else None
    call.bias = pointer(bias)
    function, _ = built(source, *_said(groups, text))
    if function is None or function(ctypes.byref(call), ctypes.c_void_p(pointer(scale))):
        return by_numbers(groups, text)
    return [y.to(x.dtype).view(*x.shape[:-1], y.shape[1])]


def _said(groups: Groups, text: str) -> tuple[str, str]:
    _, tensors = groups
    return CODES[QLinearSpec.of(text).format], TYPES[tensors[1].dtype]
