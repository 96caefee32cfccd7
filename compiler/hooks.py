"""Hooks on modules that a flat graph does not call: said where they were traced, refused where they came later.

Hooks of the whole model and of its leaves fire. A layer in between is no call any more: a hook on it that was there at
tracing has left in the graph what it did to tensors, and nothing else of it happens; one added later would be ignored.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .inside import inside
from .refusal import Refused

_KINDS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def hook_numbers(model: nn.Module) -> frozenset[int]:
    """The hooks that a model has now, by the number that torch gave each."""
    return frozenset(n for m in model.modules() for kind in _KINDS for n in m.__dict__[kind])


def refuse_silent_hooks(model: nn.Module, called: Sequence[str], traced: frozenset[int]) -> None:
    """Raise Refused where a hook was added to a module that the graph does not call."""
    if any(m is not model and _added(m, traced) for m in hooked(inside(model))):
        late = silent_hooks(model, called, traced)
        if late:
            raise Refused(
                f"a hook was added to {', '.join(late)}, and the graph does not call it",
                where=type(model).__name__,
                fits="hooks on the whole model and on its leaves (Linear, norms, embeddings); "
                "or add it before optimize(), which keeps what it does to tensors",
            )


def silent_hooks(model: nn.Module, called: Sequence[str], traced: frozenset[int] = frozenset()) -> list[str]:
    """Modules with hooks, those with these numbers aside, that do not fire where only `called` modules are called."""
    hooked = [path for path, m in model.named_modules() if path and _added(m, traced)]
    return [path for path in hooked if not any(path == c or path.startswith(f"{c}.") for c in called)]


def hooked(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Those that have hooks: every module is asked at every call."""
    found = []
    for module in modules:
        own = module.__dict__
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            found.append(module)
    return found


def _added(module: nn.Module, traced: frozenset[int]) -> bool:
    own = module.__dict__
    return any(number not in traced for kind in _KINDS for number in own[kind])
