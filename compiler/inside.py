"""What is asked of a model at every call, without the generators of `modules()` and `parameters()`."""

from __future__ import annotations

from torch import nn


def first_weight(module: nn.Module) -> nn.Parameter | None:
    """The first of `module.parameters()` that holds floating-point numbers."""
    for own in module._parameters.values():
        if own is not None and own.is_floating_point():
            return own
    found = (first_weight(held) for held in module._modules.values() if held is not None)
    return next((weight for weight in found if weight is not None), None)


def inside(model: nn.Module) -> list[nn.Module]:
    """The model itself and what it holds.

    >>> shared = nn.Linear(1, 1)
    >>> len(inside(nn.Sequential(shared, nn.Sequential(shared))))
    3
    """
    found, seen = [model], {model}
    for module in found:  # which grows
        held = module._modules
        for each in held.values() if held else ():
            if each is not None and each not in seen:
                seen.add(each)
                found.append(each)
    return found
