"""A mechanism by the text that names it: a registered name, a file that registers one, or module:Class."""

from __future__ import annotations

import importlib
import runpy
from pathlib import Path
from typing import Any

from .mechanism import mechanisms
from .refusal import Refused


def named(text: str) -> Any:
    """What `check` takes: a class, or a registered name as it is."""
    if text.endswith(".py"):
        return _registered_by(Path(text))
    module, colon, name = text.partition(":")
    if not colon:
        return text
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise Refused(f"mechanism {text!r}", fits=str(error)) from None


def _registered_by(path: Path) -> Any:
    """The one mechanism that a file registers when it is run."""
    if not path.is_file():
        raise Refused(f"file {path}", fits="a python file that registers a mechanism")
    before = mechanisms()
    runpy.run_path(str(path), run_name=path.stem)
    made = [cls for slug, cls in mechanisms().items() if before.get(slug) is not cls]
    if len(made) != 1:
        names = ", ".join(cls.slug for cls in made) or "none"
        raise Refused(f"{path} registers {names}", fits="a file that registers one mechanism")
    return made[0]
