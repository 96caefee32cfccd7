"""Rows of keys or values in a few bits: whole numbers with a scale and a zero a group, side by side as bytes.

    s = half((max x - min x) / most),   z = half(-min x),   c = clip(round((x + z) / s), 0, most),   x ~ c s - z

over each group of channels of one row; most is 255 or 15. A row of bytes holds the codes, then scales, then zeros, so
that what moves rows of a cache (joining, cutting, picking samples) moves these. Two codes of 4 bits share a byte: a
channel of the first half the low bits, its partner of the second half the high ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..refusal import Refused
from .operator import Groups, Primitive
from .rows import widened
from .spec import Spec


@dataclass(frozen=True)
class RowSpec(Spec):
    """Rows of `dim` numbers of a type, `group` of which share a scale; 0: all of a row's."""

    bits: int
    dim: int
    group: int = 0
    dtype: str = "float32"

    @property
    def groups(self) -> int:
        return self.dim // self.group if self.group else 1

    @property
    def most(self) -> int:
        return int(2**self.bits - 1)

    @property
    def codes(self) -> int:
        """Bytes of a row's codes, an even number: scales are read behind them as numbers of two bytes."""
        return -(-self.dim * self.bits // 16) * 2

    @property
    def bytes(self) -> int:
        return self.codes + 4 * self.groups


def stored(x: Tensor, spec: RowSpec) -> Tensor:
    """Rows (..., dim) as they come back from storage; the gradient passes as if they had not changed."""
    _check(x.shape[-1], spec)
    result: Tensor = stored_op(x, spec.text)[0]
    return result


def packed_rows(x: Tensor, spec: RowSpec) -> Tensor:
    """Rows (..., dim) as bytes (..., spec.bytes).

    >>> rows = packed_rows(torch.randn(2, 3, 5, 8), RowSpec(4, 8))
    >>> rows.shape, rows.dtype
    (torch.Size([2, 3, 5, 8]), torch.uint8)
    """
    _check(x.shape[-1], spec)
    result: Tensor = pack_op(x, spec.text)[0]
    return result


def unpacked_rows(rows: Tensor, spec: RowSpec) -> Tensor:
    """The numbers (..., dim) that rows of bytes stand for."""
    if rows.dtype != torch.uint8 or rows.shape[-1] != spec.bytes:
        found = f"{tuple(rows.shape)} of {rows.dtype}"
        raise Refused(found, where="unpacked_rows", fits=f"rows of {spec.bytes} bytes")
    result: Tensor = unpack_op(rows, spec.text)[0]
    return result


def _check(width: Any, spec: RowSpec) -> None:
    if spec.bits not in (4, 8):
        raise Refused(f"{spec.bits} bits", where="stored", fits="4 or 8")
    if width != spec.dim:
        raise Refused(f"rows of {width}", where="stored", fits=f"rows of {spec.dim}")
    if spec.group and spec.dim % spec.group:
        raise Refused(f"groups of {spec.group} of {spec.dim} channels", where="stored", fits=f"a divisor of {spec.dim}")


def _pack(groups: Groups, text: str) -> list[Tensor]:
    ((x,),), spec = groups, RowSpec.of(text)
    wide = widened(x).unflatten(-1, (spec.groups, -1))
    most, least = wide.amax(-1), wide.amin(-1)
    scale, zero = ((most - least) / spec.most).half(), (-least).half()
    scale = torch.where(scale == 0, 1.0, scale)
    whole = ((wide + zero[..., None].to(wide.dtype)) / scale[..., None].to(wide.dtype)).round().clamp(0, spec.most)
    codes = whole.nan_to_num().to(torch.uint8).flatten(-2)  # a scale that is no number says it already
    if spec.bits == 4:
        low, high = torch.nn.functional.pad(codes, (0, 2 * spec.codes - spec.dim)).chunk(2, -1)
        codes = low | (high << 4)
    codes = torch.nn.functional.pad(codes, (0, spec.codes - codes.shape[-1]))
    return [torch.cat((codes, _as_bytes(scale), _as_bytes(zero)), -1)]


def _unpack(groups: Groups, text: str) -> list[Tensor]:
    ((rows,),), spec = groups, RowSpec.of(text)
    codes, scale, zero = rows.split((spec.codes, 2 * spec.groups, 2 * spec.groups), -1)
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if spec.bits == 4:
        codes = torch.cat((codes & 15, codes >> 4), -1)
    wide = torch.promote_types(dtype, torch.float32)
    whole = codes[..., : spec.dim].unflatten(-1, (spec.groups, -1)).to(wide)
    numbers = whole * _as_numbers(scale).to(wide)[..., None] - _as_numbers(zero).to(wide)[..., None]
    return [numbers.flatten(-2).to(dtype)]


def _as_bytes(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8)


def _as_numbers(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.float16)


def _stored(groups: Groups, text: str) -> list[Tensor]:
    ((x,),) = groups
    with torch.no_grad():
        back = _unpack([_pack([[x]], text)], text)[0].to(x.dtype)
    return [x + (back - x).detach() if torch.is_grad_enabled() and x.requires_grad else back]


def _bytes_of(groups: Groups, text: str) -> list[Tensor]:
    ((x,),) = groups
    return [x.new_empty(*x.shape[:-1], RowSpec.of(text).bytes, dtype=torch.uint8)]


def _numbers_of(groups: Groups, text: str) -> list[Tensor]:
    ((rows,),), spec = groups, RowSpec.of(text)
    return [rows.new_empty(*rows.shape[:-1], spec.dim, dtype=getattr(torch, spec.dtype))]


def _like(groups: Groups, text: str) -> list[Tensor]:
    return [groups[0][0].new_empty(groups[0][0].shape)]


stored_op = Primitive("stored", ("rows",), _stored, _like)
pack_op = Primitive("pack_rows", ("rows",), _pack, _bytes_of)
unpack_op = Primitive("unpack_rows", ("rows",), _unpack, _numbers_of)
