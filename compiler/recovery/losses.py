"""How far a student's output is from its teacher's: KL where it is logits, relative square error where it is values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..held_out import Batch
from ..refusal import Refused


def output_loss(got: Any, expected: Any, call: Batch, how: str = "auto", temperature: float = 1.0) -> Tensor:
    """The distance of two whole outputs, padding left out."""
    ours, theirs = tensor_of(got), tensor_of(expected)
    kept = _real(call, ours)
    if is_logits(got, how):
        return kl(ours, theirs, kept, temperature)
    return relative(ours, theirs, kept)


def kl(got: Tensor, expected: Tensor, kept: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """KL(expected || got) of softmax over the last axis, a mean over positions, times temperature squared."""
    p = (expected.float() / temperature).log_softmax(-1)
    each = (p.exp() * (p - (got.float() / temperature).log_softmax(-1))).sum(-1) * temperature**2
    return each.mean() if kept is None else (each * kept).sum() / kept.sum().clamp(min=1)


def relative(got: Tensor, expected: Tensor, kept: Tensor | None = None) -> Tensor:
    """||got - expected||^2 / ||expected||^2: alike for large and small outputs."""
    weight = 1.0 if kept is None else kept[..., None]
    gap, size = (got.float() - expected.float()).square() * weight, expected.float().square() * weight
    return gap.sum() / size.sum().clamp(min=1e-20)


def tensor_of(output: Any) -> Tensor:
    """What a model's output is about: its logits, else the first floating tensor with rows."""
    if isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor):
        return output["logits"]
    for tensor in pytree.tree_leaves(dict(output) if isinstance(output, Mapping) else output):
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.ndim >= 2:
            return tensor
    raise Refused(f"an output of {type(output).__name__} without a floating tensor", where="recover")


def is_logits(output: Any, how: str) -> bool:
    """Logits are called so, or are a bare (B, classes)."""
    if how != "auto":
        return how == "logits"
    if isinstance(output, Mapping):
        return isinstance(output.get("logits"), Tensor)
    return tensor_of(output).ndim == 2


def own_loss(output: Any) -> Tensor:
    """The loss that a model gives for the labels of a call."""
    found = output.get("loss") if isinstance(output, Mapping) else None
    if not isinstance(found, Tensor):
        raise Refused("ce > 0, and the model gives no loss", where="recover", fits="calls with labels, or ce=0")
    return found


def _real(call: Batch, output: Tensor) -> Tensor | None:
    """1 at positions that are no padding, where the call says which."""
    mask = call[1].get("attention_mask")
    if isinstance(mask, Tensor) and output.ndim == 3 and mask.shape == output.shape[:2]:
        return (mask != 0).to(torch.float32)
    return None
