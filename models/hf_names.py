"""`reattend:<mechanism>` among the attention implementations of transformers, there as soon as transformers is.

Importing reattend never imports transformers: where it is not there yet, an import hook waits for the module that holds
its table of attention functions, and removes itself.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from ..compiler.mechanism import mechanism, when_registered
from ..compiler.recipe_yaml import resolve

PREFIX = "reattend:"
TABLE = "transformers.modeling_utils"


def attn_implementation(slug: str, **knobs: Any) -> str:
    """The name under which transformers finds a mechanism with its knobs; it is registered by this call.

    With default knobs the name is `reattend:<slug>` and needs no call.

    >>> attn_implementation("window", window=16, sinks=2)
    'reattend:window?sinks=2&window=16'
    >>> attn_implementation("window?window=16&sinks=2")
    'reattend:window?sinks=2&window=16'
    """
    from .hf_attention import AttentionFunction

    slug, _, written = slug.removeprefix(PREFIX).partition("?")
    for part in filter(None, written.split("&")):
        knob, _, value = part.partition("=")
        knobs[knob] = resolve(value)
    mechanism(slug, **knobs)  # refuses unknown names and knobs
    chosen = tuple(sorted(knobs.items()))
    name = f"{PREFIX}{slug}{'?' if chosen else ''}{'&'.join(f'{knob}={value}' for knob, value in chosen)}"
    _register(name, AttentionFunction(slug, chosen))
    return name


def register_names() -> None:
    """Every mechanism under its name: those registered, those that packages announce, those to come."""
    if TABLE in sys.modules:
        when_registered(_register_default)
    else:
        sys.meta_path.insert(0, _Waiting(TABLE, register_names))


def _register_default(slug: str) -> None:
    from .hf_attention import AttentionFunction

    _register(f"{PREFIX}{slug}", AttentionFunction(slug))


def _register(name: str, function: Callable[..., Any]) -> None:
    """Never an attention function alone: without its mask function the causal mask would be lost silently."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    from .hf_masks import seen

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, seen)


class _Waiting(MetaPathFinder):
    """Calls back once a module has been imported."""

    def __init__(self, module: str, then: Callable[[], None]) -> None:
        self.module, self.then = module, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                self.then()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
