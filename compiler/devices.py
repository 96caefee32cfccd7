"""Peaks of a few devices, from their makers' data sheets: what a roofline is drawn with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .refusal import Refused, nearest


@dataclass(frozen=True)
class Device:
    name: str
    flops: Mapping[torch.dtype, float]  # a second, dense products
    bandwidth: float  # bytes a second, of main memory
    memory: float  # bytes
    source: str = ""

    def peak(self, dtype: torch.dtype) -> float:
        """Of products in a type; one that is not listed runs as float32."""
        return self.flops.get(dtype, self.flops[torch.float32])

    def seconds(self, flops: float, moved: float, dtype: torch.dtype) -> float:
        """The roofline: the longer of computing and moving, as if each hid the other."""
        return max(flops / self.peak(dtype), moved / self.bandwidth)


def _cpu() -> Device:
    """This machine as it is assumed: two 8-wide fused multiply-adds a cycle at 2.5 GHz on every core, 20 GB/s."""
    each = 2 * 8 * 2 * 2.5e9
    count = os.cpu_count() or 1
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) if hasattr(os, "sysconf") else 16e9
    return Device("cpu", {torch.float32: each * count, torch.float64: each * count / 2}, 20e9, memory,
                  f"assumed: {count} cores, AVX2, 2.5 GHz, 20 GB/s")  # fmt: skip


def _table() -> dict[str, Device]:
    h100 = {torch.bfloat16: 989e12, torch.float16: 989e12, torch.float32: 67e12, torch.float64: 67e12}
    a100 = {torch.bfloat16: 312e12, torch.float16: 312e12, torch.float32: 19.5e12, torch.float64: 19.5e12}
    return {
        "h100": Device("h100", h100, 3.35e12, 80e9, "H100 SXM5 80 GB, dense, float32 without TF32"),
        "a100": Device("a100", a100, 2.039e12, 80e9, "A100 SXM4 80 GB, dense, float32 without TF32"),
        "cpu": _cpu(),
    }


def device_of(given: str | Mapping[str, Any] | Device) -> Device:
    """A device by name, or made of its peaks: {"flops": 1e14, "bandwidth": 1e12, "memory": 24e9}."""
    if isinstance(given, Device):
        return given
    if isinstance(given, str):
        known = _table()
        if given not in known:
            fits = f"{nearest(given, known, kind='devices')}; or its peaks, {{flops: , bandwidth: , memory: }}"
            raise Refused(f"device {given!r}", fits=fits)
        return known[given]
    missing = {"flops", "bandwidth", "memory"} - set(given)
    if missing:
        raise Refused(f"a device without {', '.join(sorted(missing))}", fits="flops, bandwidth, memory: numbers")
    flops = {torch.float32: float(given["flops"])}
    return Device(str(given.get("name", "given")), flops, float(given["bandwidth"]), float(given["memory"]), "given")
