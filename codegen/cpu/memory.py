"""Tensors as a kernel sees them: an address, sizes and strides in elements."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_int4 = ctypes.c_int64 * 4


class Rows(ctypes.Structure):
    """A (B, H, N, D) tensor."""

    _fields_ = [("data", ctypes.c_void_p)] + [(axis, ctypes.c_int64) for axis in "bhnd"]

    @staticmethod
    def of(t: Tensor) -> Rows:
        return Rows(t.data_ptr(), *t.stride())


class Table(ctypes.Structure):
    """A tensor of up to four axes that expressions look up."""

    _fields_ = [("data", ctypes.c_void_p), ("size", _int4), ("stride", _int4)]


def kinds_of(tables: Sequence[Tensor]) -> str:
    """Of each table whether it holds floats ("f") or whole numbers ("i")."""
    return "".join("f" if t.is_floating_point() else "i" for t in tables)


def tables_of(
    given: Sequence[Tensor], kept: list[Tensor], along: Mapping[int, int] | None = None, room: int = 0
) -> Any:
    """All tables, one after another; `along`: of some the axis whose numbers lie one behind the other; `room`: for so
    many more.
    """
    found = []
    for number, t in enumerate(given):
        flat = as_dtype(t, torch.float32 if t.is_floating_point() else torch.int32, kept)
        axis = (along or {}).get(number)
        if axis is not None and flat.stride(axis) > 1:
            flat = flat.movedim(axis, -1).contiguous().movedim(-1, axis)
            kept.append(flat)
        size, stride = [*flat.shape, 1, 1, 1, 1][:4], [*flat.stride(), 0, 0, 0, 0][:4]
        found.append(Table(flat.data_ptr(), _int4(*size), _int4(*stride)))
    return (Table * (len(found) + room))(*found)


def whole_numbers(t: Tensor, kept: list[Tensor]) -> Tensor:
    kept.append(t.to(torch.int32).contiguous())
    return kept[-1]


def as_dtype(t: Tensor, dtype: torch.dtype, kept: list[Tensor]) -> Tensor:
    kept.append(t.to(dtype))
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
