"""What a long call is at, told on a terminal in one line that goes when it is done; elsewhere nothing is said."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

_LINE: ContextVar[Any] = ContextVar("_LINE", default=None)


@contextmanager
def stages_told(name: str) -> Iterator[None]:
    """The stages inside are told, after `name`."""
    form = f"{name}: {{desc}}, {{elapsed}} so far"
    with tqdm(bar_format=form, desc="beginning", leave=False, disable=None) as line:
        token = _LINE.set(line)
        try:
            yield
        finally:
            _LINE.reset(token)


def stage(name: str) -> None:
    line = _LINE.get()
    if line is not None:
        line.set_description_str(name)
