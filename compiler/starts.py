"""How learned tensors start, as values for `Param.init`: zeros is the default, the others are torch's own habits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Start = Callable[[Tensor], Tensor]


def uniform(fan_in: int) -> Start:
    """What torch gives the weights and biases of Linear and Conv layers: uniform within 1 / sqrt(fan_in)."""
    return lambda t: t.uniform_(-(fan_in**-0.5), fan_in**-0.5)


def normal(std: float) -> Start:
    return lambda t: t.normal_(0.0, std)


def constant(value: float) -> Start:
    return lambda t: t.fill_(value)


def eye(t: Tensor) -> Tensor:
    return torch.nn.init.eye_(t)
