"""A mechanism by the text that names it: a registered name, a file that registers one, or module:Class."""

from __future__ import annotations

import importlib
import runpy
import traceback
from pathlib import Path
from typing import Any

from .mechanism import Mechanism, mechanisms
from .refusal import Refused


def named(text: str) -> Any:
    """What `check` takes: a class, or a registered name as it is."""
    if text.endswith(".py"):
        made = registered_by(Path(text))
        if len(made) > 1:
            raise Refused(f"{text} registers {', '.join(cls.slug for cls in made)}", fits="a file of one mechanism")
        return made[0]
    module, colon, name = text.partition(":")
    if not colon:
        return text
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise Refused(f"mechanism {text!r}", fits=str(error)) from None


def registered_by(path: Path) -> tuple[type[Mechanism], ...]:
    """The mechanisms that a file registers when it is run."""
    if not path.is_file():
        raise Refused(f"file {path}", fits="a python file that registers a mechanism")
    before = mechanisms()
    try:
        runpy.run_path(str(path), run_name=path.stem)
    except Refused:
        raise
    except Exception as error:  # the user's own code runs here
        found = f"{type(error).__name__}: {error}"
        raise Refused(found, where=_place_in(path, error), fits="a file that runs") from None
    made = tuple(cls for slug, cls in mechanisms().items() if before.get(slug) is not cls)
    if not made:
        fits = "@reattend.register('name') above @dataclass(frozen=True) above class Name(reattend.Mechanism)"
        raise Refused(f"{path} registers no mechanism", fits=fits)
    return made


def _place_in(path: Path, error: Exception) -> str:
    """The line of a file that an error came through last."""
    frames = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else frames[-1] if frames else None
    return f"{path}:{line}" if line else str(path)
