"""What a hosted model knows beside its modules, how one tells that it is hosted, and the way back to the original."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .capture import Captured
from .signature import Call, SignatureKey

ProgramFor = Callable[[nn.Module, Call], Captured]
STATE = "_reattend"  # the attribute of a hosted model that holds its Hosting


@dataclass
class Hosting:
    """What a hosted model knows beside its modules: who makes its graphs, and those made so far."""

    program_for: ProgramFor
    graphs: dict[SignatureKey, Captured] = field(default_factory=dict)
    limit: int = 8
    frozen: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)  # config values when it was hosted
    hooks: frozenset[int] = frozenset()  # those it had when it was hosted: traced with the model
    leaves: Mapping[str, nn.Module] = field(default_factory=dict)  # its leaf modules at that time
    current: SignatureKey | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    traces: dict[str, Tensor] = field(default_factory=dict)
    small: dict[Any, bool] = field(default_factory=dict)  # sizes of 0 and 1 at which a graph was asked about
    about: Any = None  # who rewrites: its report and sites are the hosted model's
    parts: dict[str, Hosting] = field(default_factory=dict)  # of parts that are called alone

    def __getstate__(self) -> dict[str, Any]:
        """A copy has had no call: the last one's losses are of the original's history of gradients."""
        return self.__dict__ | {"losses": {}, "traces": {}}


def hosting(model: Any) -> Hosting:
    """What a hosted model knows beside its modules."""
    state: Hosting = model.__dict__[STATE]
    return state


def is_hosted(model: nn.Module) -> bool:
    return hasattr(type(model), "_reattend_made_from")


def original(model: nn.Module) -> nn.Module:
    """The same model, over the same modules and tensors, with its own class's forward."""
    made_from = getattr(type(model), "_reattend_made_from", None)
    if made_from is None:
        return model
    view: nn.Module = object.__new__(made_from)
    view.__dict__ = {n: v for n, v in model.__dict__.items() if n != STATE}
    return view


def about(model: nn.Module) -> Any:
    """Who rewrote a hosted model; None where it is not one."""
    return hosting(model).about if is_hosted(model) else None
