"""All modules of a model, each once: what is asked at every call walks without the generators of `modules()`."""

from __future__ import annotations

from torch import nn


def inside(model: nn.Module) -> list[nn.Module]:
    """The model itself and what it holds.

    >>> shared = nn.Linear(1, 1)
    >>> len(inside(nn.Sequential(shared, nn.Sequential(shared))))
    3
    """
    found, seen = [model], {model}
    for module in found:  # which grows
        for held in module._modules.values():
            if held is not None and held not in seen:
                seen.add(held)
                found.append(held)
    return found
