"""`qlinear` by panels of float32, for processors without products of bytes and calls that theirs cannot say."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...compiler.primitives.operator import Groups
from ...compiler.primitives.qlinear import rounded_rows
from ...compiler.primitives.qlinear_spec import QLinearSpec
from .memory import pointer
from .qlinear import by_numbers
from .qlinear_units import LEAST, call_of, odd, said_of
from .skeleton import skeleton
from .toolchain import built


def source(codes: str, scales: str) -> str:
    """The whole C++ text for a way of storing weights and the type of their scales."""
    said = [f"#define CODES {codes}", f"#define SCALES {scales}"]
    return skeleton("qlinear_codes.hpp", "qlinear_panels.cpp", said=said)


def refuses(groups: Groups, text: str) -> str | None:
    """Why a call is not handed to panels: nothing would be gained, or it cannot be."""
    (x,), tensors = groups
    spec = QLinearSpec.of(text)
    if x.numel() == 0 or tensors[0].shape[0] * spec.inputs < LEAST:
        return "few weights"
    return no_panels(groups, text) or built(source, *said_of(tensors, spec))[1]


def no_panels(groups: Groups, text: str) -> str | None:
    """Why the skeleton cannot say a call, whatever it would gain."""
    (x,), tensors = groups
    spec = QLinearSpec.of(text)
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"{x.dtype}"
    return f"groups of {spec.group}" if spec.group % 32 else odd(tensors, spec)


def run(groups: Groups, text: str) -> list[Tensor]:
    (x,), tensors = groups
    spec = QLinearSpec.of(text)
    named = dict(zip(spec.names, tensors))
    rows = x.reshape(-1, spec.inputs).float().contiguous()
    scale = None
    if spec.activations:
        rows, scale = rounded_rows(rows, tensors[1].dtype)
        rows, scale = rows.float().contiguous(), scale.float().reshape(-1).contiguous()
    y = torch.empty(rows.shape[0], tensors[0].shape[0])
    call = call_of(rows, named, y, spec)
    bias = named["bias"].float() if spec.bias else None
    call.bias = pointer(bias)
    function, _ = built(source, *said_of(tensors, spec))
    if function is None:
        return by_numbers(groups, text)
    function(ctypes.byref(call), ctypes.c_void_p(pointer(scale)))
    return [y.to(x.dtype).view(*x.shape[:-1], y.shape[1])]
