"""Weights as whole numbers: one scale an output, scales and zeros a group, or groups of whole numbers under one scale.

`half` is rounding to float16, in which scales are stored; a scale that becomes 0 is 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...compiler.refusal import Refused
from .gptq import compensated

LEVELS = 15  # of 4 bits
PROTECTED = 120  # the largest u for which 4-bit codes of groups always multiply back into 8 bits (QServe, section 4.1)


def by_output(w: Tensor) -> tuple[Tensor, Tensor]:
    """codes (N, K) int8 and scale (N,) float32: w ~ codes scale."""
    scale = _nonzero(w.abs().amax(1) / 127)
    return (w / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def by_group(w: Tensor, group: int, gram: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """codes (N, K) 0..15, scale and zero (N, G) float16: w ~ codes scale - zero; `gram` of the inputs: by GPTQ."""
    grouped = _grouped(w, group)
    most, least = grouped.amax(-1), grouped.amin(-1)
    scale, zero = _nonzero(half((most - least) / LEVELS)), half(-least)

    def nearest(column: Tensor, k: int) -> tuple[Tensor, Tensor]:
        s, z = scale[:, k // grouped.shape[-1]].double(), zero[:, k // grouped.shape[-1]].double()
        code = ((column + z) / s).round().clamp(0, LEVELS)
        return code, code * s - z

    codes = ((grouped + zero[..., None]) / scale[..., None]).round().clamp(0, LEVELS).flatten(1).to(torch.uint8)
    return (codes if gram is None else compensated(w, gram, nearest)), scale.half(), zero.half()


def progressive(w: Tensor, group: int, gram: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """codes (N, K) 0..15, scale (N,) float16, step and zero (N, G) int8: w ~ (codes step - zero) scale.

    codes step - zero is a whole number of 8 bits for whatever w: products stay in 8 bits (QServe, equations 4 to 6).
    """
    scale = _nonzero(half(w.abs().amax(1) / PROTECTED))
    u = _grouped((w / scale[:, None]).clamp(-PROTECTED, PROTECTED), group)
    most, least = u.amax(-1), u.amin(-1)
    step = _nonzero(((most - least) / LEVELS).round().clamp(-127, 127))
    zero = (-least).round().clamp(-128, 127)

    def nearest(column: Tensor, k: int) -> tuple[Tensor, Tensor]:
        s, z = step[:, k // u.shape[-1]].double(), zero[:, k // u.shape[-1]].double()
        code = ((column.clamp(-PROTECTED, PROTECTED) + z) / s).round().clamp(0, LEVELS)
        return code, code * s - z

    codes = ((u + zero[..., None]) / step[..., None]).round().clamp(0, LEVELS).flatten(1).to(torch.uint8)
    codes = codes if gram is None else compensated(u.flatten(1), gram, nearest)
    return codes, scale.half(), step.to(torch.int8), zero.to(torch.int8)


def half(t: Tensor) -> Tensor:
    found = t.half()
    if not t.is_meta and bool(found.isinf().any()):
        largest = float(t.abs().max())
        raise Refused(f"a scale of {largest:.3g}, beyond float16", fits="w8, whose scales are float32, or `keep`")
    return found.float()


def _grouped(w: Tensor, group: int) -> Tensor:
    return w.view(w.shape[0], -1, group or w.shape[1])


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)
