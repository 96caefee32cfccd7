"""C++ text becomes a loaded library: the system's compiler, and a cache that processes and torn files cannot break.

A library is named by the hash of everything that decides it (text, compiler, flags, processor) and ends with the hash
of its own bytes, so that one atomic rename publishes it and a damaged one is noticed and built again.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...compiler.doctor import cpp_compiler, cpu_flags
from ...compiler.refusal import Refused

_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math",
          "-ffp-contract=fast", "-fno-signed-zeros", "-Wno-psabi", "-w")  # fmt: skip
_DIGEST = 32  # bytes behind a library: sha256 of those before


@dataclass(frozen=True)
class Toolchain:
    """A C++ compiler and what it calls itself."""

    command: str
    version: str

    def build(self, text: str) -> ctypes.CDLL:
        """The library of a text, from the cache where it is there and whole."""
        key = hashlib.sha256("\0".join((text, self.version, *_FLAGS, _processor())).encode()).hexdigest()[:32]
        path = cache_folder() / f"{key}.so"
        if not _whole(path):
            self._compile(text, path)
        return ctypes.CDLL(str(path))

    def _compile(self, text: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".building-") as folder:
            source, built = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
            source.write_text(text, encoding="utf-8")
            command = [self.command, *_FLAGS, "-shared", str(source), "-o", str(built)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                kept = path.with_suffix(".cpp")
                kept.write_text(text, encoding="utf-8")
                said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
                raise Refused(f"{self.command} failed: {said}", where=str(kept), fits="please report this kernel")
            with built.open("ab") as library:
                library.write(_digest(built.read_bytes()))
            built.replace(path)


@lru_cache(maxsize=1)
def toolchain() -> Toolchain | None:
    """The system's C++ compiler, None without one."""
    found = cpp_compiler()
    return None if found is None else Toolchain(*found)


NO_COMPILER = "no C++ compiler"


@lru_cache(maxsize=1024)
def built(source: Callable[..., str], *said: Any) -> tuple[Any, str | None]:
    """The `run` of the library whose text is source(*said), or None and why there is none."""
    tools = toolchain()
    if tools is None:
        return None, NO_COMPILER
    try:
        return tools.build(source(*said)).run, None
    except Refused as refused:
        return None, str(refused)
    except OSError as error:  # a home that cannot be written to, a library that cannot be loaded
        return None, f"{error.filename or cache_folder()}: {error.strerror or error}"


def cache_folder() -> Path:
    """Where built kernels are kept: $REATTEND_CACHE, else the user's cache."""
    chosen = os.environ.get("REATTEND_CACHE")
    base = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "reattend"
    return base / "cpu"


def _whole(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return len(content) > _DIGEST and _digest(content[:-_DIGEST]) == content[-_DIGEST:]


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _processor() -> str:
    """What -march=native stands for here: a home that several machines share must not mix their libraries."""
    return " ".join([platform.machine(), *sorted(cpu_flags())])
