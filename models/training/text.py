"""The text of the byte model: the Python standard library's own sources, split into training and held-out files."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

SEPARATOR = 0  # a byte that no source holds: begins every file, and is the model's begin and end token

# neither written by hand for people to read nor present on every machine
_LEFT_OUT = {"test", "tests", "idlelib", "site-packages", "dist-packages", "encodings", "ensurepip", "lib2to3"}
_HELD_OUT = 12  # every twelfth file, by the hash of its name


@dataclass(frozen=True)
class Text:
    """Some files of the standard library, one after another, as bytes."""

    names: tuple[str, ...]
    root: Path

    @cached_property
    def bytes(self) -> np.ndarray:
        parts = [bytes([SEPARATOR]) + (self.root / name).read_bytes() for name in self.names]
        return np.frombuffer(b"".join(parts).replace(b"\r\n", b"\n"), dtype=np.uint8)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.bytes.tobytes()).hexdigest()

    def window(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """`length` bytes from somewhere."""
        start = int(rng.integers(0, len(self.bytes) - length))
        return self.bytes[start : start + length]

    def windows(self, length: int, count: int) -> np.ndarray:
        """`count` rows of `length` bytes, evenly spread: the same ones at every call."""
        starts = np.linspace(0, len(self.bytes) - length, count).astype(int)
        return np.stack([self.bytes[start : start + length] for start in starts])


def standard_library() -> tuple[Text, Text]:
    """Training files and held-out files; which is which depends on a file's name alone."""
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(
        str(path.relative_to(root)) for path in root.rglob("*.py") if not _LEFT_OUT & set(path.relative_to(root).parts)
    )
    train = tuple(name for name in names if not _is_held_out(name))
    return Text(train, root), Text(tuple(name for name in names if _is_held_out(name)), root)


def _is_held_out(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % _HELD_OUT == 0
