"""Source text becomes kernels: a file per text, named by its hash, that processes cannot tear and a reader can open."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from functools import lru_cache
from pathlib import Path
from types import ModuleType


def loaded(source: str) -> ModuleType:
    """The module of a text. Triton reads the source of its functions back from the file."""
    return _load(source)


@lru_cache(maxsize=1024)
def _load(source: str) -> ModuleType:
    name = f"kernel_{hashlib.sha256(source.encode()).hexdigest()[:32]}"
    try:
        path = _file(folder() / f"{name}.py", source)
    except OSError:  # a home that cannot be written to
        path = _file(Path(tempfile.mkdtemp(prefix="reattend-")) / f"{name}.py", source)
    found = importlib.util.spec_from_file_location(f"reattend_{name}", path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


def folder() -> Path:
    """Where generated sources are kept: $REATTEND_CACHE, else the user's cache."""
    chosen = os.environ.get("REATTEND_CACHE")
    base = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "reattend"
    return base / "triton"


def _file(path: Path, source: str) -> Path:
    """The text in its place; one atomic rename publishes it, and what a torn file holds is not it."""
    if _content(path) != source:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(source)
        os.replace(draft, path)
    return path


def _content(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
