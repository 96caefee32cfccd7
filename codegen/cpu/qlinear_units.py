"""`qlinear` by generated C++: few rows by vectors, weights unpacked in registers; more by the matrix units, or where a
processor has none by its products of four bytes at a time ("dots").
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ...compiler.doctor import cpu_flags
from ...compiler.primitives.operator import Groups
from ...compiler.primitives.qlinear import rounded_rows
from ...compiler.primitives.qlinear_spec import QLinearSpec
from .memory import pointer
from .qlinear import by_numbers
from .skeleton import skeleton
from .toolchain import built

FEW = 4  # rows up to which vectors are faster than units; measured
_FEWER = 2  # the same where units take bfloat16 apart, or torch's product with bytes is there
_APART = 10  # rows up to which bfloat16 is faster taken apart into whole numbers than bytes made bfloat16; measured
LEAST = 1 << 16  # weights of a layer; fewer are not worth a library of their own
_MOST = 1 << 16  # inputs whose products are sure to fit into a sum of 32 bits
DOTS = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512_vnni", "f16c"})
ROADS = {"units": "matrix units", "dots": "four bytes at a time", "": "no products of bytes"}
_CODES = {"int8": "BYTES", "int4": "NIBBLES", "qoq": "NESTED"}
_TYPES = {torch.float32: "FLOAT", torch.bfloat16: "HALF", torch.float16: "HALF"}
_address, _whole = ctypes.c_void_p, ctypes.c_int64


class Call(ctypes.Structure):
    _fields_ = [*[(name, _address) for name in ("x", "codes", "scale", "step", "zero", "bias", "y")],
                *[(size, _whole) for size in ("M", "K", "N", "row", "groups", "bias_type", "threads")]]  # fmt: skip


def source(codes: str, digits: int, x: str, scales: str, halves: str) -> str:
    """The whole C++ text for a way of storing weights, whole numbers for each of x or 0, the types of x and scales."""
    whole = digits > 0
    parts = 3 if x == "FLOAT" and not whole else 1
    head = [
        f"#define CODES {codes}",
        f"#define INPUT {x}",
        f"#define SCALES {scales}",
        f"#define MULTIPLY_ALL {'MULTIPLY_WHOLE' if whole else 'MULTIPLY'}",
        f"constexpr bool WHOLE = {'true' if whole else 'false'};",
        f"constexpr int PARTS = {parts}, DIGITS = {max(digits, 1)};",
    ]
    products = "qlinear_dots.hpp" if halves == "dots" else "qlinear_tiles.hpp"
    return skeleton("qlinear.hpp", products, "qlinear.cpp", said=head, halves=halves)


def source_few(codes: str, scales: str) -> str:
    """The whole C++ text for few rows of float32, or of the whole numbers that they are rounded to."""
    return skeleton("qlinear_codes.hpp", "qlinear_few.cpp", said=[f"#define CODES {codes}", f"#define SCALES {scales}"])


def few(groups: Groups, text: str) -> str | None:
    """Why a call is not handed to the vectors."""
    (x,), tensors = groups
    spec = QLinearSpec.of(text)
    rows = x.numel() // max(spec.inputs, 1)
    if not 0 < rows <= FEW:
        return f"{rows} rows"
    wide = bool(road()) or rows > _FEWER
    if wide and spec.format == "int8" and x.dtype == torch.bfloat16 and not spec.activations:
        return "bfloat16 with bytes"
    if tensors[0].shape[0] * spec.inputs < LEAST:
        return "few weights"
    many = rows > _FEWER or road() == "dots"
    if (spec.activations or (many and x.dtype == torch.bfloat16)) and refuses(groups, text) is None:
        return f"{rows} rows of {'whole numbers' if spec.activations else 'bfloat16'}"
    return no_vectors(groups, text) or built(source_few, *said_of(tensors, spec))[1]


def no_vectors(groups: Groups, text: str) -> str | None:
    """Why the skeleton for few rows cannot say a call."""
    (x,), tensors = groups
    spec = QLinearSpec.of(text)
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"{x.dtype}"
    return odd(tensors, spec)


def run_few(groups: Groups, text: str) -> list[Tensor]:
    (x,), tensors = groups
    spec = QLinearSpec.of(text)
    named = dict(zip(spec.names, tensors))
    rows = x.reshape(-1, spec.inputs).float().contiguous()
    scale: Tensor | None = None
    if spec.activations:
        rows, scale = rounded_rows(rows, tensors[1].dtype)
        rows = rows.float().contiguous()
    y = torch.empty(rows.shape[0], tensors[0].shape[0])
    call = call_of(rows, named, y, spec)
    bias = named["bias"].float() if spec.bias else None
    call.bias = pointer(bias if scale is None else None)
    function, _ = built(source_few, *said_of(tensors, spec))
    if function is None or function(ctypes.byref(call)):
        return by_numbers(groups, text)
    if scale is not None:
        y = y * scale if bias is None else y * scale + bias
    return [y.to(x.dtype).view(*x.shape[:-1], y.shape[1])]


@lru_cache(maxsize=1)
def road() -> str:
    """How this processor multiplies many bytes: by matrix units, a few at a time, or not."""
    if {"amx_int8", "amx_bf16"} <= cpu_flags():
        return "units"
    return "dots" if cpu_flags() >= DOTS else ""


def refuses(groups: Groups, text: str) -> str | None:
    """Why a call is not handed to the products of bytes."""
    (x,), tensors = groups
    spec = QLinearSpec.of(text)
    if not road():
        return ROADS[""]
    if x.numel() == 0 or tensors[0].shape[0] * spec.inputs < LEAST:
        return "few weights"
    return no_tiles(groups, text, road()) or built(source, *_said(groups, spec, road()), road())[1]


def no_tiles(groups: Groups, text: str, by: str) -> str | None:
    """Why the skeleton cannot say a call to units or dots, whether this processor has them or not."""
    (x,), tensors = groups
    spec = QLinearSpec.of(text)
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"{x.dtype}"
    if spec.inputs > _MOST:
        return f"{spec.inputs} inputs"
    if spec.group % 32 or (spec.format == "int4" and spec.activations and spec.group):
        return f"groups of {spec.group}"
    if spec.format == "qoq" and not spec.activations:
        return "nested scales without whole activations"
    if _digits(x, spec, by) == 0:  # weights become bfloat16
        if x.dtype == torch.float32 and (spec.format == "int4" or by == "dots"):
            return f"groups of {spec.group} in float32"
        if by == "dots" and "avx512_bf16" not in cpu_flags():
            return "no products of bfloat16"
    return odd(tensors, spec)


def odd(tensors: Sequence[Tensor], spec: QLinearSpec) -> str | None:
    if any(not t.is_contiguous() for t in tensors) or tensors[1].dtype not in (torch.float32, torch.float16):
        return "scales of another type, or not contiguous"
    return "a bias of another type" if spec.bias and tensors[-1].dtype not in (torch.float32, torch.bfloat16) else None


def run(groups: Groups, text: str, by: str = "") -> list[Tensor]:
    (x,), tensors = groups
    by = by or road()
    spec = QLinearSpec.of(text)
    named = dict(zip(spec.names, tensors))
    rows = x.reshape(-1, spec.inputs).contiguous()
    y = torch.empty(rows.shape[0], tensors[0].shape[0], dtype=x.dtype)
    call = call_of(rows, named, y, spec)
    call.bias_type = int(spec.bias and named["bias"].dtype == torch.bfloat16)
    function, _ = built(source, *_said(groups, spec, by), by)
    if function is None or function(ctypes.byref(call)):
        return by_numbers(groups, text)  # no matrix units for this process
    return [y.view(*x.shape[:-1], y.shape[1])]


def call_of(rows: Tensor, named: Mapping[str, Tensor], y: Tensor, spec: QLinearSpec) -> Call:
    call = Call(M=rows.shape[0], K=spec.inputs, N=y.shape[1], row=named["codes"].stride(0), groups=spec.groups)
    call.x, call.y, call.threads = rows.data_ptr(), y.data_ptr(), torch.get_num_threads()
    for name in ("codes", "scale", "step", "zero", "bias"):
        setattr(call, name, pointer(named.get(name)))
    return call


def said_of(tensors: Sequence[Tensor], spec: QLinearSpec) -> tuple[str, str]:
    """How a skeleton for float32 names what is stored, and the type of its scales."""
    return _CODES[spec.format], _TYPES[tensors[1].dtype]


def _said(groups: Groups, spec: QLinearSpec, by: str) -> tuple[str, int, str, str]:
    (x,), tensors = groups
    return _CODES[spec.format], _digits(x, spec, by), _TYPES[x.dtype], _TYPES[tensors[1].dtype]


def _digits(x: Tensor, spec: QLinearSpec, by: str) -> int:
    """How many whole numbers stand for one of x, 0: it stays what it is, and codes become bfloat16.

    Three say a float32 to 2**-23 of its row's largest. Sums within a group are then whole.
    """
    if spec.activations:
        return 1
    if spec.format == "int4" and spec.groups > 1 and spec.group % 64:
        return 0
    if x.dtype == torch.float32:
        return 3 if by == "dots" or spec.format == "int4" else 0
    bare = by == "dots" and "avx512_bf16" not in cpu_flags()
    return 3 if bare or x.numel() <= _APART * spec.inputs else 0
