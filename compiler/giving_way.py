"""What a hosted model can do beside being the user's model gives way to what the user's model has under that name."""

from __future__ import annotations

from typing import Any

_HELD = ("_modules", "_parameters", "_buffers")  # which nn.Module looks into after its class


class GivingWay:
    """A method or property of a class in front of the user's: a module, parameter or buffer of its name comes first."""

    def __init__(self, name: str, ours: Any) -> None:
        self.name, self.ours, self.__doc__ = name, ours, ours.__doc__

    def __get__(self, model: Any, kind: type | None = None) -> Any:
        for held in _HELD if model is not None else ():
            own = model.__dict__.get(held) or {}
            if self.name in own:
                return own[self.name]
        return self.ours.__get__(model, kind)


def giving_way(kind: type) -> type:
    """The class, its public names wrapped."""
    for name, ours in list(vars(kind).items()):
        if not name.startswith("_"):
            setattr(kind, name, GivingWay(name, ours))
    return kind
