"""How large the blocks of a kernel are, by head size and device: what fits without spills, from compiled kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache


@dataclass(frozen=True)
class Blocks:
    """Rows of queries and keys of a block, warps that share it, tiles in flight."""

    rows: int
    keys: int
    warps: int
    stages: int


@lru_cache(maxsize=256)
def forward_blocks(dim: int, values: int, rows: int, bits: int, target: str = "cuda:90") -> Blocks:
    """For heads of `dim` and `values` channels, as many rows as there are, numbers of `bits`."""
    widest = max(padded(dim), padded(values))
    tall = min(128, max(16, padded(rows)))
    if bits == 32:  # products of float32 take twice the registers and the shared memory
        if widest > 128:
            return Blocks(min(tall, 32), 16, 4, 1) if target.startswith("hip") else Blocks(16, 32, 8, 1)
        return Blocks(min(tall, 64), 32 if widest > 64 else 64, 4, 2)
    if target.startswith("hip"):
        return Blocks(tall, 64 if widest <= 64 else 32, 4, 1)
    if widest > 128:
        return Blocks(min(tall, 64), 32, 8 if tall >= 64 else 4, 2)
    if widest > 64 and target == "cuda:80":  # with 64 keys registers spill there
        return Blocks(tall, 32, 8 if tall == 128 else 4, 3)
    stages = 3 if widest <= 64 or tall == 16 or target == "cuda:100" else 2
    return Blocks(tall, 64, 8 if tall == 128 else 4, stages)


def stored_blocks(blocks: Blocks, target: str) -> Blocks:
    """The same where keys and values are read as they are stored: their numbers are made in registers."""
    found = replace(blocks, stages=min(blocks.stages, 2))
    return replace(found, keys=16) if target == "cuda:80" and blocks.rows >= 64 else found


def padded(size: int) -> int:
    """The power of two that holds a size; products want 16 at least."""
    return max(16, 1 << (size - 1).bit_length())


def smaller(blocks: Blocks) -> Iterator[Blocks]:
    """The same with fewer tiles in flight, then with fewer keys and rows, down to what a product takes."""
    while blocks.stages > 1 or blocks.keys > 16 or blocks.rows > 16:
        if blocks.stages > 1:
            blocks = replace(blocks, stages=1)
        elif blocks.keys > 16:
            blocks = replace(blocks, keys=blocks.keys // 2)
        else:
            blocks = replace(blocks, rows=blocks.rows // 2)
        yield blocks


def gradient_blocks(dim: int, values: int, bits: int, target: str = "cuda:90") -> tuple[Blocks, Blocks]:
    """Of the gradient over rows of queries, and of that over tiles of keys."""
    widest = max(padded(dim), padded(values))
    if bits == 32 and widest > 128:
        least = Blocks(16, 16, 4, 1)
        return (least, least) if target.startswith("hip") else (Blocks(16, 32, 8, 1), Blocks(32, 16, 8, 1))
    if bits == 32 or widest > 128:
        return Blocks(32, 32, 4, 1), Blocks(32, 32, 8 if widest > 128 and not target.startswith("hip") else 4, 1)
    if target.startswith("hip"):
        return Blocks(64, 64, 4, 1), Blocks(32 if widest > 64 else 64, 64, 4, 1)
    if target.startswith(("cuda:9", "cuda:1")):
        older = target.startswith("cuda:9")
        keys = Blocks(32, 64, 8, 3) if widest > 64 and older else Blocks(64, 64, 8, 2)
        if widest > 64:
            return Blocks(64, 64, 8, 2), keys
        return Blocks(64, 64, 4, 2) if older else Blocks(64, 32, 8, 2), keys
    rows = 64 if widest <= 64 else 32
    return Blocks(64, rows, 8, 2), Blocks(32, 64, 4 if widest <= 64 else 8, 2)


def scanning_blocks(dim: int, values: int, bits: int, target: str = "cuda:90") -> tuple[Blocks, Blocks]:
    """The same where sums run along the keys: more is held of each pair, and both know the same tiles of keys."""
    queries, keys = gradient_blocks(dim, values, bits, target)
    if bits == 32 or target.startswith("hip"):
        return queries, replace(keys, keys=queries.keys)
    if max(dim, values) > 64:  # elsewhere registers spill
        queries = {"cuda:80": replace(queries, rows=32), "cuda:100": replace(queries, warps=4)}.get(target, queries)
    return replace(queries, keys=32), replace(keys, keys=32)
