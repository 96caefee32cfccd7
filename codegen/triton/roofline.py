"""How long a kernel should take on a device, from its work and what one block of it occupies; nothing runs.

A pass over the tiles is bound by products, by other arithmetic or by memory; how near it comes to that depends on how
many blocks a multiprocessor holds at once, and on a last wave that leaves some of them idle. The figure is for ranking
blocks before there are measurements, not a promise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .blocks import Blocks


@dataclass(frozen=True)
class Machine:
    """What a GPU can do by its data sheet: dense bfloat16 products, float32 arithmetic, memory; one multiprocessor."""

    processors: int
    products: float  # FLOP/s
    arithmetic: float  # FLOP/s
    bandwidth: float  # B/s
    registers: int  # of a multiprocessor, 32 bits each
    shared: int  # bytes of a multiprocessor
    warps: int
    lanes: int


MACHINES = {
    "cuda:80": Machine(108, 312e12, 19.5e12, 2.0e12, 65536, 167936, 64, 32),
    "cuda:90": Machine(132, 989e12, 67e12, 3.35e12, 65536, 233472, 64, 32),
    "cuda:100": Machine(148, 2250e12, 80e12, 8.0e12, 65536, 233472, 64, 32),
    "hip:gfx942": Machine(304, 1307e12, 163e12, 5.3e12, 131072, 65536, 32, 64),
}
_PER_SCORE = 12.0  # arithmetic on one score: scale, mask, maximum, power, sum, conversion
_HIDING = 8  # warps that hide each other's waiting
_LAUNCH = 4e-6  # seconds that one more kernel takes to begin: assumed, of all four
_MOST_SHARES = 64
_NEAR = 2.5  # how much faster than memory the cache before it is: assumed, of all four


@dataclass(frozen=True)
class Work:
    """One kernel's share of a call: what it must compute and read, and the scores that it touches."""

    products: float
    scores: float
    bytes: float  # that go through memory once
    read: float  # bytes of keys and values that one block of rows reads, most of them from a cache


def forward_work(batch: int, heads: int, kv_heads: int, n: int, m: int, dim: int, values: int, kept: float) -> Work:
    """Of `attend` in 16 bits: two products for each pair kept; q, k, v and o once, k and v again for each block."""
    pairs = batch * heads * n * m * kept
    once = batch * n * heads * (dim + values) + batch * m * kv_heads * (dim + values)
    return Work(2 * pairs * (dim + values), pairs, 2.0 * once, 2.0 * m * kept * (dim + values))


def seconds(work: Work, programs: int, blocks: Blocks, registers: int, shared: int, target: str) -> float:
    """The time of one kernel with these blocks, of which one occupies so many registers a thread and bytes."""
    gpu = machine(target)
    held = occupancy(blocks, registers, shared, target)
    if held == 0:
        return math.inf
    waves = programs / (gpu.processors * held)
    idle = math.ceil(waves) / waves if waves > 0 else 1.0
    hidden = min(1.0, held * blocks.warps / _HIDING)
    # a product of few rows leaves part of a matrix unit idle
    filled = min(1.0, blocks.rows / 64) * min(1.0, blocks.keys / 32)
    computed = work.products / (gpu.products * filled) + work.scores * _PER_SCORE / gpu.arithmetic
    cached = programs * work.read / (_NEAR * gpu.bandwidth)
    return max(computed / hidden, cached, work.bytes / gpu.bandwidth) * idle


def occupancy(blocks: Blocks, registers: int, shared: int, target: str) -> int:
    """Blocks that one multiprocessor holds at once.

    >>> occupancy(Blocks(128, 64, 8, 3), 130, 64 * 1024, "cuda:90")
    1
    >>> occupancy(Blocks(64, 64, 4, 2), 128, 48 * 1024, "cuda:90")
    4
    """
    gpu = machine(target)
    by_registers = gpu.registers // (max(registers, 1) * blocks.warps * gpu.lanes)
    by_shared = gpu.shared // max(shared, 1)
    return min(by_registers, by_shared, gpu.warps // blocks.warps)


def machine(target: str) -> Machine:
    """The one of a target, or the smallest of its make."""
    return MACHINES.get(target, MACHINES["hip:gfx942" if target.startswith("hip") else "cuda:80"])


def best_shares(work: Work, programs: int, tiles: int, gathered: int, blocks: Blocks, target: str) -> int:
    """Among how many programs the `tiles` of each should be divided, where `gathered` numbers of a share are joined.

    >>> one_token = forward_work(1, 32, 8, 1, 32768, 128, 128, 1.0)
    >>> best_shares(one_token, 8, 512, 32 * 130, Blocks(16, 64, 4, 2), "cuda:90")
    32
    >>> best_shares(forward_work(1, 32, 8, 1, 64, 128, 128, 1.0), 8, 1, 32 * 130, Blocks(16, 64, 4, 2), "cuda:90")
    1
    """
    width = work.read / max(tiles * blocks.keys, 1)  # bytes of one key and its value
    shared = int(width * blocks.keys * blocks.stages)

    def taken(count: int) -> float:
        alone = seconds(replace(work, read=work.read / count), programs * count, blocks, 128, shared, target)
        joined = 8.0 * gathered * count / machine(target).bandwidth + _LAUNCH
        return alone + (joined if count > 1 else 0.0)

    return min((1 << power for power in range(_MOST_SHARES.bit_length()) if 1 << power <= max(tiles, 1)), key=taken)


def ranked(
    work: Work, rows: int, groups: int, candidates: dict[Blocks, tuple[int, int]], target: str
) -> list[tuple[float, Blocks]]:
    """Blocks by the time that they should take; of each its registers and shared bytes, as compiled."""
    found = [
        (seconds(work, -(-rows // blocks.rows) * groups, blocks, registers, shared, target), blocks)
        for blocks, (registers, shared) in candidates.items()
    ]
    return sorted(found, key=lambda each: each[0])
