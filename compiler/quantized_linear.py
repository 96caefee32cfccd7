"""A linear layer whose weights are codes and scales: stands in a model where an `nn.Linear` stood."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .primitives.qlinear import qlinear
from .primitives.qlinear_spec import QLinearSpec, dequantized


class QuantizedLinear(nn.Module):
    """Its tensors are buffers of their own types, whatever type the model is cast to; the bias stays a parameter."""

    is_leaf = True  # a graph calls it as one module (leaves.py), though it may hold no parameter

    def __init__(
        self, spec: QLinearSpec, tensors: Sequence[Tensor], *, scheme: str, dtype: torch.dtype, bias: Any = None
    ) -> None:
        super().__init__()
        self.spec, self.scheme, self.dtype = spec, scheme, dtype
        for name, tensor in zip(spec.names, tensors):
            self.register_buffer(name, tensor)
        self.register_parameter("bias", bias)

    @property
    def in_features(self) -> int:
        return self.spec.inputs

    @property
    def out_features(self) -> int:
        codes: Any = self.codes
        return int(codes.shape[0])

    @property
    def weight(self) -> Tensor:
        """The weights that the codes stand for; a copy, made at each call."""
        return dequantized([getattr(self, n) for n in self.spec.names], self.spec).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return qlinear(x, [getattr(self, name) for name in self.spec.names], self.spec)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        kept = {name: tensor.dtype for name, tensor in self._buffers.items() if tensor is not None}
        old = self._buffers.copy()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, dtype in kept.items():
            now, before = self._buffers[name], old[name]
            if now is not None and before is not None and now.dtype != dtype:
                self._buffers[name] = before.to(now.device)
        return self


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantized layers of a model by path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def described(layer: QuantizedLinear) -> dict[str, Any]:
    """What a file must say of a layer beside its tensors."""
    return {
        "spec": layer.spec.text,
        "scheme": layer.scheme,
        "outputs": layer.out_features,
        "dtype": str(layer.dtype).removeprefix("torch."),
    }


def layer_of(said: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> QuantizedLinear:
    """The layer of a description and its tensors by name."""
    spec = QLinearSpec.of(str(said["spec"]))
    own = [tensors[name] for name in spec.names if name != "bias"]
    bias = nn.Parameter(tensors["bias"]) if spec.bias else None
    return QuantizedLinear(spec, own, scheme=str(said["scheme"]), dtype=getattr(torch, str(said["dtype"])), bias=bias)
