"""Tensors as a kernel sees them: an address, sizes and strides in elements."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_int4 = ctypes.c_int64 * 4


class Rows(ctypes.Structure):
    """A (B, H, N, D) tensor of float32."""

    _fields_ = [("data", ctypes.c_void_p)] + [(axis, ctypes.c_int64) for axis in "bhnd"]

    @staticmethod
    def of(t: Tensor) -> Rows:
        return Rows(t.data_ptr(), *t.stride())


class Table(ctypes.Structure):
    """A tensor of up to four axes that expressions look up."""

    _fields_ = [("data", ctypes.c_void_p), ("size", _int4), ("stride", _int4)]


def table_kinds(given: Sequence[Tensor], kept: list[Tensor]) -> tuple[str, Any]:
    """Of each table whether it holds floats ("f") or whole numbers ("i"), and all of them side by side."""
    kinds, found = "", []
    for t in given:
        kind = "f" if t.is_floating_point() else "i"
        flat = t.to(torch.float32) if kind == "f" else t.to(torch.int32)
        kept.append(flat)
        size, stride = [*flat.shape, 1, 1, 1, 1][:4], [*flat.stride(), 0, 0, 0, 0][:4]
        found.append(Table(flat.data_ptr(), _int4(*size), _int4(*stride)))
        kinds += kind
    return kinds, (Table * len(found))(*found)


def whole_numbers(t: Tensor, kept: list[Tensor]) -> Tensor:
    kept.append(t.to(torch.int32).contiguous())
    return kept[-1]


def as_float(t: Tensor, kept: list[Tensor]) -> Tensor:
    kept.append(t.float())
    return kept[-1]


def index_of(table: Tensor | None, kept: list[Tensor]) -> tuple[int, int, int]:
    """Address and strides (b, h) of a table (M,), (B|1, M) or (B|1, H|1, M) of whole numbers."""
    if table is None:
        return 0, 0, 0
    flat = whole_numbers(table, kept)
    wide = flat[:, None] if flat.ndim == 2 else flat[(None,) * (3 - flat.ndim)]
    return pointer(flat), step(wide, 0), step(wide, 1)


def step(t: Tensor, axis: int) -> int:
    """The stride of an axis, 0 where it has one place for all."""
    return 0 if t.shape[axis] == 1 else t.stride(axis)


def pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
