"""torch's own layers where their forward does what no trace can follow: a fused op, a look at a mask's numbers.

Under autocast nn.TransformerEncoderLayer's fused op has all of a layer in the low precision, norms and sums included.
torch.export takes the plain path, whose norms autocast leaves in float32: a graph of it casts as the fused op does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from torch.nn.modules import transformer

from .inside import inside


@contextmanager
def masks_as_given() -> Iterator[None]:
    """While tracing, stacks of layers do not look at a mask's numbers: that it is causal only saves them work."""
    kept = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = kept


def may_fuse(model: nn.Module) -> bool:
    """Whether layers of the model may run their fused op here: under a CPU's autocast, without gradients, in eval."""
    low = torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
    return low and any(isinstance(m, nn.TransformerEncoderLayer) and not m.training for m in inside(model))


@contextmanager
def cast_as_fused(model: nn.Module, *, fused: bool) -> Iterator[None]:
    """While tracing, layers that would run their fused op cast what it casts."""
    layers = [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)] if fused else []
    hooks = []
    for layer in filter(_fuses, layers):
        hooks.append(layer.register_forward_pre_hook(_cast))
        hooks += [norm.register_forward_hook(_rounded) for norm in (layer.norm1, layer.norm2)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _fuses(layer: nn.TransformerEncoderLayer) -> bool:
    """Its own forward on two tokens tells: the plain path ends in a norm or a sum in float32."""
    weight = layer.linear1.weight
    with torch.no_grad():
        answer: Tensor = layer(weight.new_zeros(1, 2, weight.shape[1]))
    return answer.dtype is not weight.dtype


def _cast(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return args[0].to(torch.get_autocast_dtype("cpu")), *args[1:]


def _rounded(norm: nn.LayerNorm, args: tuple[Any, ...], _: Tensor) -> Tensor:
    low = torch.get_autocast_dtype("cpu")
    weight, bias = norm.weight.to(low), None if norm.bias is None else norm.bias.to(low)
    return layer_norm(args[0], norm.normalized_shape, weight, bias, norm.eps).to(low)
