"""What every generated `qlinear` is called with, and the calls that none can be made of."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...compiler.primitives.qlinear_spec import QLinearSpec
from .memory import pointer

LEAST = 1 << 16  # weights of a layer; fewer are not worth a library of their own
CODES = {"int8": "BYTES", "int4": "NIBBLES", "qoq": "NESTED"}
TYPES = {torch.float32: "FLOAT", torch.bfloat16: "HALF", torch.float16: "HALF"}
_address, _whole = ctypes.c_void_p, ctypes.c_int64


class Call(ctypes.Structure):
    _fields_ = [*[(name, _address) for name in ("x", "codes", "scale", "step", "zero", "bias", "y")],
                *[(size, _whole) for size in ("M", "K", "N", "row", "groups", "bias_type", "threads")]]  # fmt: skip


def call_of(rows: Tensor, named: Mapping[str, Tensor], y: Tensor, spec: QLinearSpec) -> Call:
    call = Call(M=rows.shape[0], K=spec.inputs, N=y.shape[1], row=named["codes"].stride(0), groups=spec.groups)
    call.x, call.y, call.threads = rows.data_ptr(), y.data_ptr(), torch.get_num_threads()
    for name in ("codes", "scale", "step", "zero", "bias"):
        setattr(call, name, pointer(named.get(name)))
    return call


def odd(tensors: Sequence[Tensor], spec: QLinearSpec) -> str | None:
    """Why what is stored cannot be read as it lies there."""
    if any(not t.is_contiguous() for t in tensors) or tensors[1].dtype not in (torch.float32, torch.float16):
        return "scales of another type, or not contiguous"
    return "a bias of another type" if spec.bias and tensors[-1].dtype not in (torch.float32, torch.bfloat16) else None
