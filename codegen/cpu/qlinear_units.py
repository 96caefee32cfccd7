"""`qlinear` by generated C++ with products of bytes: by the matrix units, or where a processor has none by its products
of four bytes at a time ("dots").
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from ...compiler.doctor import cpu_flags
from ...compiler.primitives.operator import Groups
from ...compiler.primitives.qlinear_spec import QLinearSpec
from .qlinear import by_numbers
from .qlinear_call import CODES, LEAST, TYPES, call_of, odd
from .skeleton import skeleton
from .toolchain import built

# Rows up to which bfloat16 is faster taken apart into whole numbers than codes made bfloat16, measured: units read
# bytes as they lie, while fewer bits are unpacked either way.
_APART, _APART_AS_THEY_LIE = 10, 64
_MOST = 1 << 16  # inputs whose products are sure to fit into a sum of 32 bits
DOTS = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512_vnni", "f16c"})
ROADS = {"units": "matrix units", "dots": "four bytes at a time", "": "no products of bytes"}


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


def _said(groups: Groups, spec: QLinearSpec, by: str) -> tuple[str, int, str, str]:
    (x,), tensors = groups
    return CODES[spec.format], _digits(x, spec, by), TYPES[x.dtype], TYPES[tensors[1].dtype]


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
    apart = _APART_AS_THEY_LIE if by != "dots" and spec.format == "int8" else _APART
    return 3 if bare or x.numel() <= apart * spec.inputs else 0
