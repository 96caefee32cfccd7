"""Parts of a hosted model that are called alone, get_encoder() among them: rewritten as they are within the whole.

A part's own class over the model's own modules and tensors, its forward running graphs of its calls, made by the
decisions that the whole model's first call took.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from .hosting import Hosting, hosting
from .refusal import Refused, nearest

ViewOf = Callable[[nn.Module, str, Hosting, Any], nn.Module]  # hosts a part: (part, path, state of the whole, work)


def encoding(made_from: Any, view_of: ViewOf) -> Callable[..., Any]:
    """The class's own get_encoder; where sites within what it gives were rewritten, a hosted one."""

    @functools.wraps(made_from.get_encoder)
    def get_encoder(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = made_from.get_encoder(self, *args, **kwargs)
        path = next((name for name, module in self.named_modules() if module is found and name), "")
        return _hosted(self, path, found, view_of) if path else found

    return get_encoder


def part_of(model: nn.Module, path: str, view_of: ViewOf) -> nn.Module:
    """The module at a path, hosted where sites within it were rewritten; before a first call that is not known."""
    if not hosting(model).graphs:
        raise Refused("no call has been captured yet", where="part", fits="call the whole model once, or give inputs")
    modules = dict(model.named_modules())
    if not path or path not in modules:
        raise Refused(f"no module {path!r}", where="part", fits=nearest(path, filter(None, modules), kind="modules"))
    return _hosted(model, path, modules[path], view_of)


def _hosted(model: nn.Module, path: str, part: nn.Module, view_of: ViewOf) -> nn.Module:
    state = hosting(model)
    work = state.about.part(path) if hasattr(state.about, "part") else None
    return part if work is None else view_of(part, path, state, work)
