"""A kernel and its arguments meet a device: run there, or only noted for one that is not there."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ...compiler.primitives.operator import Groups
from .arguments import Arguments
from .module import loaded

log = logging.getLogger("reattend")

_NO_CODE = "PassManager::run failed"  # what a backend of Triton says that finds no code for a kernel
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


class UnfitError(Exception):
    """A kernel that a device has no room for, or that Triton cannot make for it."""


KINDS = (torch.float32, torch.bfloat16, torch.float16)  # what is multiplied
_LOOKED_UP = (*KINDS, torch.float64, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_LEAST = (8, 0)  # the first NVIDIA GPUs that multiply bfloat16


def unfit(groups: Groups) -> str | None:
    """Why no generated kernel takes these tensors, whatever it is asked to do with them."""
    tensors = [t for group in groups for t in group]
    first = tensors[0]
    if not _has_triton():
        return "no triton"
    if first.dtype not in KINDS:
        return f"{first.dtype}"
    for t in tensors:
        if t.device != first.device:
            return f"a tensor on {t.device} beside one on {first.device}"
        if t.dtype not in _LOOKED_UP:
            return f"a tensor of {t.dtype}"
    return _too_old(first.device) if first.device.type == "cuda" else None


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _too_old(device: torch.device) -> str | None:
    found = torch.cuda.get_device_capability(device)
    if torch.version.hip or found >= _LEAST:
        return None
    return f"a GPU of compute capability {found[0]}.{found[1]}, at least {_LEAST[0]}.{_LEAST[1]}"


def launched(source: str, name: str, grid: tuple[int, ...], given: Arguments) -> None:
    """One kernel, on its arguments by name; the first time on a device Triton compiles it, some seconds long."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

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
        raise UnfitError(str(error)) from None
    except (CompilationError, PTXASError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and _NO_CODE not in str(error):
            raise
        log.warning("%s cannot be made for %s: %s", name, device, str(error).strip().split("\n")[-1])
        raise UnfitError(f"{name}: {error}") from None


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
