"""nn.TransformerEncoder's fast path packs what is not padding and unpacks it with zeros: a graph of it has them too.

torch.export takes the plain path, where padding holds whatever attention made of it; the next norm or decoder reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .inside import inside

KEPT = "padding kept"  # in a signature: padding holds what attention made of it


def packing(model: nn.Module) -> list[nn.TransformerEncoder]:
    """The encoders that pack their input here: not where gradients of their weights are asked for."""
    return [encoder for encoder in _packable(model) if not (torch.is_grad_enabled() and _learns(encoder))]


def keeps_padding(model: nn.Module) -> bool:
    """Whether an encoder that packs without gradients does not here."""
    return torch.is_grad_enabled() and any(map(_learns, _packable(model)))


def _packable(model: nn.Module) -> list[nn.TransformerEncoder]:
    return [m for m in inside(model) if isinstance(m, nn.TransformerEncoder) and _packs(m)]


def _learns(encoder: nn.TransformerEncoder) -> bool:
    """Its forward asks its first layer alone."""
    first = encoder.layers[0]
    return not first.training and any(p.requires_grad for p in first.parameters())


@contextmanager
def zeros_at_padding(encoders: Sequence[nn.TransformerEncoder]) -> Iterator[None]:
    """While tracing, encoders that would pack their input give zeros where it is padding."""
    hooks = [e.layers[-1].register_forward_hook(partial(_emptied, e), with_kwargs=True) for e in encoders]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _packs(encoder: nn.TransformerEncoder) -> bool:
    return bool(getattr(encoder, "use_nested_tensor", False)) and len(encoder.layers) > 0


def _emptied(encoder: nn.TransformerEncoder, _: Any, args: Any, asked: dict[str, Any], output: Tensor) -> Tensor | None:
    """Where the encoder itself would not pack, nothing: these are the conditions of its forward."""
    mask, pairs = asked.get("src_key_padding_mask"), asked.get("src_mask")
    plain = encoder.layers[0].training or torch.is_autocast_enabled() or not torch.backends.mha.get_fastpath_enabled()
    if plain or mask is None or pairs is not None or output.dim() != 3:
        return None
    padding = mask != 0
    if getattr(encoder, "mask_check", True):  # only what is padded on the right is packed
        padding = padding & ~(padding[:, :-1] & ~padding[:, 1:]).any()
    return output.masked_fill(padding.unsqueeze(-1), 0.0)
