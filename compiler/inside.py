"""All modules of a model, each once: what is asked at every call walks without the generators of `modules()`."""

from __future__ import annotations

from torch import nn


def inside(model: nn.Module) -> list[nn.Module]:
    """The model itself and what it holds.

    >>> shared = nn.Linear(1, 1)
    >>> len(inside(nn.Sequential(shared, nn.Sequential(shared))))
    3
    """
    found, seen, waiting = [], set(), [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in seen:
            seen.add(id(module))
            found.append(module)
            waiting += [m for m in module._modules.values() if m is not None]
    return found
