"""The plain values of a model's config, which a forward may read: a graph holds them as they were when it was made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

_PLAIN = (bool, int, float, str, type(None))


def config_values(model: nn.Module) -> dict[str, Any]:
    values = getattr(getattr(model, "config", None), "__dict__", {})
    return {name: value for name, value in values.items() if isinstance(value, _PLAIN)}


def changed_config(model: nn.Module, known: Mapping[str, Any]) -> tuple[str, ...]:
    """What is said of each value that is another now: part of a call's signature."""
    now = config_values(model)
    changed = [name for name, value in now.items() if name not in known or known[name] != value]
    return tuple(f"config.{name}={now[name]!r}" for name in sorted(changed))
