"""What became of a kernel when it was compiled for a target, kept beside its source: pages need not compile it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor

from .launching import Launch
from .module import folder


def remember(target: str, launch: Launch, facts: Mapping[str, Any]) -> None:
    with suppress(OSError):  # a home that cannot be written to: it is compiled again
        path = _path(target, launch)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps(facts), encoding="utf-8")
        beside.replace(path)


def remembered(target: str, launch: Launch) -> dict[str, Any] | None:
    """None where it was not compiled here, by this version of Triton."""
    try:
        found = json.loads(_path(target, launch).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _path(target: str, launch: Launch) -> Path:
    source, name, _, given = launch
    said = sorted((key, _kind(value)) for key, value in given.items())
    key = "\0".join((source, name, target, metadata.version("triton"), repr(said)))
    return folder() / "compiled" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _kind(value: Any) -> Any:
    return str(value.dtype) if isinstance(value, Tensor) else value
