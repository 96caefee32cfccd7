"""A kernel and its arguments meet a device: run there, or only noted for one that is not there."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .arguments import Arguments
from .module import loaded

log = logging.getLogger("reattend")

Launch = tuple[str, str, tuple[int, ...], Arguments]  # a source, the kernel's name in it, programs, arguments


@dataclass(frozen=True)
class Recording:
    """A target that is not there, and what would have been launched on it."""

    target: str
    launches: list[Launch]


_RECORDING: ContextVar[Recording | None] = ContextVar("_RECORDING", default=None)


@contextmanager
def recorded(target: str) -> Iterator[list[Launch]]:
    """Nothing runs inside: what would be launched on a target is kept."""
    recording = Recording(target, [])
    token = _RECORDING.set(recording)
    try:
        yield recording.launches
    finally:
        _RECORDING.reset(token)


class TooLargeError(Exception):
    """A block wants more shared memory or registers than the device has."""


def launched(source: str, name: str, grid: tuple[int, ...], given: Arguments) -> None:
    """One kernel, on its arguments by name; the first time on a device Triton compiles it, some seconds long."""
    from triton.runtime.errors import OutOfResources

    recording = _RECORDING.get()
    if recording is not None:
        recording.launches.append((source, name, grid, given))
        return
    device = next(t.device for t in given.values() if isinstance(t, Tensor))
    _say_once(source, name, str(device))
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            getattr(loaded(source), name)[grid](**given)
    except OutOfResources as error:
        raise TooLargeError(str(error)) from None


@lru_cache(maxsize=4096)
def _say_once(source: str, name: str, device: str) -> None:
    log.info("compiling %s for %s", name, device)


def precision(q: Tensor) -> str:
    """How products of float32 are made: as torch's own are, or closer."""
    if q.dtype != torch.float32 or target(q).startswith("hip"):
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def target(q: Tensor) -> str:
    recording = _RECORDING.get()
    if recording is not None or q.device.type != "cuda":
        return recording.target if recording else "cuda:90"
    major, minor = torch.cuda.get_device_capability(q.device)
    return f"hip:{major}{minor}" if torch.version.hip else f"cuda:{major}{minor}"
