"""The text form of one `qlinear`, and its weights: how codes, scales and zeros stand for numbers, and how codes lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .spec import Spec

FORMATS = ("int8", "int4", "qoq")
ACTIVATIONS = ("", "int8")
BLOCK = 64  # codes of 4 bits that lie together: 32 bytes, the first half of the codes in the low nibbles
# the tensors of a format, in order; a bias comes last where there is one
TENSORS = {
    "int8": ("codes", "scale"),  # (N, K) int8, (N,): w = c s
    "int4": ("codes", "scale", "zero"),  # (N, bytes) uint8, (N, G), (N, G): w = c s - z
    "qoq": ("codes", "scale", "step", "zero"),  # (N, bytes) uint8, (N,), (N, G) int8, (N, G) int8: w = (c step - z) s
}


@dataclass(frozen=True)
class QLinearSpec(Spec):
    """K inputs; groups of `group` inputs share a scale, 0: all of an output's; "" leaves activations as they are."""

    format: str
    inputs: int
    group: int = 0
    activations: str = ""
    bias: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return (*TENSORS[self.format], *(("bias",) if self.bias else ()))

    @property
    def groups(self) -> int:
        return self.inputs // self.group if self.group else 1


def packed(codes: Tensor) -> Tensor:
    """Codes 0..15 (N, K) as bytes (N, 32 ceil(K / 64)), rows filled up with 0.

    >>> packed(torch.arange(16)[None]).shape, int(packed(torch.arange(16)[None])[0, 3])
    (torch.Size([1, 32]), 3)
    """
    rows, count = codes.shape
    whole = torch.nn.functional.pad(codes.to(torch.uint8), (0, -count % BLOCK)).view(rows, -1, 2, BLOCK // 2)
    return (whole[:, :, 0] | (whole[:, :, 1] << 4)).reshape(rows, -1)


def unpacked(stored: Tensor, inputs: int) -> Tensor:
    """The codes (N, K) of packed bytes."""
    halves = stored.view(stored.shape[0], -1, 1, BLOCK // 2)
    return torch.cat((halves & 15, halves >> 4), 2).reshape(stored.shape[0], -1)[:, :inputs]


def whole_weights(tensors: Sequence[Tensor], spec: QLinearSpec, dtype: torch.dtype = torch.float64) -> Tensor:
    """The whole numbers w8 (N, K) that are multiplied by one scale an output: "int8" and "qoq"."""
    if spec.format == "int8":
        return tensors[0].to(dtype)
    codes, _, step, zero = tensors[:4]
    return _by_group(unpacked(codes, spec.inputs), step, zero, dtype)


def dequantized(tensors: Sequence[Tensor], spec: QLinearSpec, dtype: torch.dtype = torch.float64) -> Tensor:
    """The weights (N, K) that stand for a layer's; in float64 what every kernel multiplies with."""
    if spec.format == "int4":
        return _by_group(unpacked(tensors[0], spec.inputs), tensors[1], tensors[2], dtype)
    return whole_weights(tensors, spec, dtype) * tensors[1].to(dtype)[:, None]


def _by_group(codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    grouped = codes.to(dtype).view(*scale.shape, -1)
    return (grouped * scale.to(dtype)[..., None] - zero.to(dtype)[..., None]).flatten(1)
