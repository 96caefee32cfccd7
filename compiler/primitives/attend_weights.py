"""How the logits of a row become weights: softmax, a plain sum, none, stick-breaking, groups with a leader each."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .attend_spec import AttendSpec

Value = Callable[[str, Tensor], Tensor]  # an expression in s, b, h, i, of the shape of s


def weights_of(
    logits: Tensor, kept: Tensor, spec: AttendSpec, value: Value, leaders: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Normalised weights (B, H, N, M) and the log of their sum before normalisation (B, H, N)."""
    virtual = value(spec.sink, logits.new_zeros(*logits.shape[:3], 1)) if spec.sink else None
    match spec.normaliser:
        case "softmax":
            return _softmax(logits.masked_fill(~kept, -math.inf), virtual)
        case "grouped":
            assert leaders is not None
            return _grouped(logits.masked_fill(~kept, -math.inf), leaders, virtual)
        case "stick":
            return _stick(logits, kept)
    weight = spec.weight or "exp(s)"
    raw = value(weight, logits.masked_fill(~kept, 0.0)).masked_fill(~kept, 0.0)
    total = raw.sum(-1, keepdim=True)
    if virtual is not None:
        total = total + value(weight, virtual)
    if spec.normaliser == "sum":
        return raw / _or_one(total + spec.eps), _log(total)
    return raw, _log(total)


def _softmax(masked: Tensor, virtual: Tensor | None) -> tuple[Tensor, Tensor]:
    top = highest(masked)
    if virtual is not None:
        top = torch.maximum(top, virtual.expand(top.shape))
    top = torch.where(torch.isfinite(top), top, 0.0).detach()
    raw = torch.exp(masked - top)
    total = raw.sum(-1, keepdim=True)
    if virtual is not None:
        total = total + torch.exp(virtual - top)
    return raw / _or_one(total), top.squeeze(-1) + _log(total)


def highest(masked: Tensor) -> Tensor:
    """The largest of each row, -inf of an empty one."""
    floor = masked.new_full((*masked.shape[:-1], 1), -math.inf)
    return torch.cat((masked, floor), -1).amax(-1, keepdim=True)


def _or_one(divisor: Tensor) -> Tensor:
    return torch.where(divisor != 0, divisor, 1.0)


def _log(total: Tensor) -> Tensor:
    """Of a sum (B, H, N, 1); -inf where nothing was summed, and then without a gradient."""
    some = total != 0
    return torch.where(some, torch.log(torch.where(some, total, 1.0)), -math.inf).squeeze(-1)


def _stick(logits: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """From the last key backwards: log A_j = s_j - sum_{t >= j} softplus(s_t); lse is the log of what is left over."""
    broken = torch.nn.functional.softplus(logits).masked_fill(~kept, 0.0)
    left = logits - broken.flip(-1).cumsum(-1).flip(-1)
    least = math.log(torch.finfo(left.dtype).tiny)  # below it processors compute slowly, for what is as good as 0
    return torch.exp(left.masked_fill(~kept | (left < least), -math.inf)), -broken.sum(-1)


def _grouped(masked: Tensor, leaders: Tensor, virtual: Tensor | None) -> tuple[Tensor, Tensor]:
    """One softmax over the leaders; a leader hands its weight to its followers by a softmax of theirs.

    `leaders` (B, H, N, M) names the column that leads each; a column that leads itself and has no followers keeps its
    weight.
    """
    m, own = masked.shape[-1], torch.arange(masked.shape[-1], device=leaders.device)
    leads = leaders == own
    outer, lse = _softmax(masked.masked_fill(~leads, -math.inf), virtual)
    size = _even(leaders, leads, own)
    if size is not None:
        ends = own // size * size + size - 1
        return _by_blocks(outer, masked.masked_fill(leads | (ends >= m), -math.inf), size), lse
    follows = ~leads & (masked > -math.inf) & (leaders >= 0) & (leaders < m)
    at = leaders.clamp(0, max(m - 1, 0))
    inner = masked.masked_fill(~follows, -math.inf)
    top = torch.full_like(masked, -math.inf).scatter_reduce(-1, at, inner.detach(), "amax", include_self=True)
    top = torch.where(torch.isfinite(top), top, 0.0)
    raw = torch.exp(inner - top.gather(-1, at))
    total = torch.zeros_like(raw).scatter_add(-1, at, raw)
    shared = raw / _or_one(total).gather(-1, at)
    led = torch.zeros_like(raw).scatter_add(-1, at, follows.to(raw.dtype)) > 0
    return outer.masked_fill(led, 0.0) + shared * outer.gather(-1, at), lse


def _even(leaders: Tensor, leads: Tensor, own: Tensor) -> int | None:
    """The size of blocks of columns, if all that do not lead themselves are led by the last of their block, or None."""
    if not leaders.numel():
        return None
    size = int(leaders[..., 0].max()) + 1
    return size if size > 0 and bool((leads | (leaders == own // size * size + size - 1)).all()) else None


def _by_blocks(outer: Tensor, inner: Tensor, size: int) -> Tensor:
    """`_grouped` where followers (inner, -inf elsewhere) stand in blocks of a size, each led by its last column."""
    m = outer.shape[-1]
    outer, inner = (torch.nn.functional.pad(t, (0, -m % size), value=fill).unflatten(-1, (-1, size))
                    for t, fill in ((outer, 0.0), (inner, -math.inf)))  # fmt: skip
    top = inner.detach().amax(-1, keepdim=True)
    raw = torch.exp(inner - torch.where(top > -math.inf, top, 0.0))
    total, head = raw.sum(-1, keepdim=True), outer[..., -1:]
    kept = torch.cat((outer[..., :-1], torch.where(total > 0, 0.0, head)), -1)
    return (kept + raw * (head / _or_one(total))).flatten(-2)[..., :m]
