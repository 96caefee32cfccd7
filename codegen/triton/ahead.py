"""Kernels compiled for a GPU that is not there, the way a launch would compile them, and what became of them.

A driver stands in that knows its target and launches nothing, so that arguments are specialised as in production. What
comes back is read from the machine code: registers, bytes spilled, shared memory against the device's limit, and the
matrix instructions in it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...compiler.refusal import Refused, nearest
from .launching import recorded
from .module import loaded
from .remembered import remember


@dataclass(frozen=True)
class Device:
    """A target: how Triton calls it, the shared memory that one block may have, its matrix instruction."""

    backend: str
    arch: int | str
    warp: int
    shared: int
    matrix: str  # in its assembly, for blocks of 64 rows and more

    @property
    def name(self) -> str:
        return f"{self.backend}:{self.arch}"


_NARROW = "[HI]MMA"
TARGETS = {
    d.name: d
    for d in (
        Device("cuda", 80, 32, 163 * 1024, _NARROW),
        Device("cuda", 90, 32, 227 * 1024, "[HI]GMMA"),
        Device("cuda", 100, 32, 227 * 1024, "UTC[HI]MMA"),
        Device("hip", "gfx942", 64, 64 * 1024, "v_mfma"),
    )
}


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target."""

    kernel: str
    target: str
    registers: int
    spilled: int  # bytes of a thread's registers that go to memory
    shared: int  # bytes of a block
    matrix: int  # matrix instructions
    warps: int
    narrow: int = 0  # matrix instructions for blocks of fewer rows, where a device has others for these

    @property
    def fits(self) -> bool:
        return self.shared <= TARGETS[self.target].shared

    def __str__(self) -> str:
        said = f"{self.registers} registers, {self.spilled} B spilled, {self.shared // 1024} KB shared"
        said += f", {self.matrix or self.narrow} matrix instructions, {self.warps} warps"
        return f"{self.kernel} for {self.target}: {said}"


def device(name: str) -> Device:
    if name not in TARGETS:
        raise Refused(f"target {name!r}", where="build", fits=nearest(name, TARGETS))
    return TARGETS[name]


def compiled(target: str, call: Callable[[], object]) -> list[Compiled]:
    """What a call would launch on a target, compiled: nothing runs."""
    with recorded(target) as launches:
        call()
    with _standing_in(device(target)):
        made = [_compile(device(target), *each) for each in launches]
    for launch, facts in zip(launches, made, strict=True):
        remember(target, launch, asdict(facts))
    return made


def _compile(target: Device, source: str, name: str, grid: tuple[int, ...], given: dict[str, Any]) -> Compiled:
    made = getattr(loaded(source), name).warmup(grid=grid, **given)
    if made is None:
        raise Refused("Triton interprets kernels in this process", where="build", fits="TRITON_INTERPRET unset")
    read = _of_amd if target.backend == "hip" else _of_nvidia
    registers, spilled, matrix, narrow = read(made, target)
    about = made.metadata
    return Compiled(name, target.name, registers, spilled, about.shared, matrix, about.num_warps, narrow)


def _of_nvidia(made: Any, target: Device) -> tuple[int, int, int, int]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = _said(str(tools / "cuobjdump"), "-res-usage", file.name)
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert found is not None, usage
        code = _said(str(tools / "nvdisasm"), "-c", file.name)
    wide, narrow = (len(re.findall(rf"\b{name}", code)) for name in (target.matrix, _NARROW))
    return int(found[1]), int(found[2]), wide, 0 if target.matrix == _NARROW else narrow


def _of_amd(made: Any, target: Device) -> tuple[int, int, int, int]:
    code = made.asm["amdgcn"]
    counts = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", code)}
    return counts["vgpr_count"], 4 * counts["vgpr_spill_count"], code.count(target.matrix), 0


def _said(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


@contextmanager
def _standing_in(target: Device) -> Iterator[None]:
    """A driver for a target that is not there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class Absent(DriverBase):
        def __init__(self) -> None:
            self.launcher_cls = None

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> Any:
            return GPUTarget(target.backend, target.arch, target.warp)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_benchmarker(self) -> Callable[..., list[float]]:
            return lambda call, quantiles=(0.5,), **how: [0.0] * len(quantiles)

        def get_current_device(self) -> str:
            return target.name  # kernels are kept by device

        def get_current_stream(self, device: Any = None) -> int:
            return 0

    drivers = triton.runtime.driver
    before = drivers._active
    drivers.set_active(Absent())
    try:
        yield
    finally:
        drivers._active = before
