"""What a head's influence is measured on: the loss of a call for each sample, from its labels or its own answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from ..refusal import Refused
from ..verification import CHOICE_WIDTH

Loss = Callable[[Any, Mapping[str, Any]], Tensor]  # of an output and the call's arguments by name: (B,) or one number


def loss_for(output: Any, given: Mapping[str, Any]) -> Loss:
    """The loss that fits a call, from the intact model's output on it.

    With `labels` the model's own loss; of a language model the cross-entropy of the next token; of a classifier that
    of its own choice.
    """
    if given.get("labels") is not None and getattr(output, "loss", None) is not None:
        return lambda out, arguments: out.loss
    logits = _logits(output)
    ids = _tokens(given, logits)
    if ids is not None:
        return next_token
    if logits.ndim == 2 and logits.shape[1] > 1:
        chosen = logits.argmax(-1)
        return lambda out, arguments: F.cross_entropy(_logits(out).float(), chosen, reduction="none")
    fits = "loss=a function of (output, arguments by name) that gives (B,) or one number"
    raise Refused(f"no loss is known for an output {tuple(logits.shape)}", where="heads", fits=fits)


def next_token(output: Any, given: Mapping[str, Any]) -> Tensor:
    """Mean cross-entropy of each token of a row given those before it; padding by `attention_mask` does not count."""
    logits = _logits(output)
    ids = _tokens(given, logits)
    assert ids is not None
    each = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")  # (B, N - 1)
    mask = given.get("attention_mask")
    counted = torch.ones_like(each) if mask is None or mask.ndim != 2 else mask[:, 1:].to(each.dtype)
    return (each * counted).sum(-1) / counted.sum(-1).clamp(min=1)


def _logits(output: Any) -> Tensor:
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 0:
            return leaf
    raise Refused("an output without floating numbers", where="heads", fits="a model that gives logits")


def _tokens(given: Mapping[str, Any], logits: Tensor) -> Tensor | None:
    """The ids that logits (B, N, V) speak about."""
    if logits.ndim != 3 or logits.shape[-1] < CHOICE_WIDTH:
        return None
    whole = (v for v in given.values() if isinstance(v, Tensor) and v.dtype == torch.long and v.ndim == 2)
    ids = given.get("input_ids", next(whole, None))
    fits = isinstance(ids, Tensor) and ids.shape == logits.shape[:2] and int(ids.max()) < logits.shape[-1]
    return ids if fits else None
