"""Source text becomes kernels: a file per text, named by its hash, that processes cannot tear and a reader can open."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from functools import lru_cache
from pathlib import Path
from types import ModuleType


@lru_cache(maxsize=1024)
def loaded(source: str) -> ModuleType:
    """The module of a text. Triton reads the source of its functions back from the file."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:32]
    path = folder() / f"kernel_{digest}.py"
    if not _whole(path, source):
        _write(path, source)
    found = importlib.util.spec_from_file_location(f"reattend_{path.stem}", path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def folder() -> Path:
    """Where generated sources are kept: $REATTEND_CACHE, else the user's cache."""
    chosen = os.environ.get("REATTEND_CACHE")
    base = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "reattend"
    return base / "triton"


def _whole(path: Path, source: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == source
    except (OSError, UnicodeDecodeError):
        return False


def _write(path: Path, source: str) -> None:
    """One atomic rename publishes a file; a home that cannot be written to is replaced by a temporary one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(source)
    os.replace(draft, path)
