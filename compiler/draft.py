"""A graph that is being changed: while drafting, its code is made when it is run, not after every change."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import fx

_DRAFTING: ContextVar[bool] = ContextVar("drafting", default=False)


@contextmanager
def drafting() -> Iterator[None]:
    """Inside, `recompile` only marks a Draft; generating code is half of what rewriting a large graph would cost.

    Garbage is collected afterwards: a graph is many objects that all stay, and each collection would walk them again.
    """
    token, collecting = _DRAFTING.set(True), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        _DRAFTING.reset(token)
        if collecting:
            gc.enable()


class Draft(fx.GraphModule):
    """An fx.GraphModule that can put its compilation off."""

    def recompile(self) -> Any:
        stale = _DRAFTING.get()
        self.__dict__["_stale"] = stale
        return None if stale else super().recompile()

    def ready(self) -> Draft:
        """With code that is up to date."""
        if self.__dict__.get("_stale"):
            self.__dict__["_stale"] = False
            super().recompile()
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.ready()
        return super().__call__(*args, **kwargs)

    @property
    def code(self) -> str:
        self.ready()
        return super().code
