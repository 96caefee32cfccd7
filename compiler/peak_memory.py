"""The most bytes that the allocations of one call hold at once, above what was held before it.

On a CPU every allocation and release that torch's own allocator makes is read from the profiler, those inside kernels
included; what a math library keeps to itself is not seen. On a GPU the caching allocator counts.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

HOW = {"cpu": "allocator events of torch.profiler", "cuda": "torch.cuda.max_memory_allocated"}


def peak_bytes(run: Callable[[], Any], device: str = "cpu", *, warm: bool = True) -> int:
    """The peak of one call; `warm`: it is made once before, so that what it keeps for good is not counted."""
    if warm:
        run()
    return _on_gpu(run) if device == "cuda" else _on_cpu(run)


def _on_cpu(run: Callable[[], Any]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it writes of its own starts and stops to stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:  # else 2.11 warns
        run()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held, most = 0, 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def _on_gpu(run: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
