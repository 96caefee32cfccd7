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


SAID = "_reattend_said"  # where a model in islands holds what it says under public names


def ours(model: Any, name: str) -> Any:
    """What an optimized model says or does under a name, also where a module of the user's has that name."""
    said = model.__dict__.get(SAID, {})
    if name in said:
        return said[name]
    found = next((own for k in type(model).__mro__ if isinstance(own := vars(k).get(name), GivingWay)), None)
    return getattr(model, name) if found is None else found.ours.__get__(model, type(model))


def say(model: Any, said: dict[str, Any]) -> None:
    """Hold what a model says, and show it under its names as far as the user's model leaves these free."""
    model.__dict__[SAID] = said
    own = {name for held in _HELD for name in model.__dict__.get(held) or {}}
    model.__dict__ |= {name: value for name, value in said.items() if name not in own}


def giving_way(kind: type) -> type:
    """The class, its public names wrapped."""
    for name, ours in list(vars(kind).items()):
        if not name.startswith("_"):
            setattr(kind, name, GivingWay(name, ours))
    return kind
