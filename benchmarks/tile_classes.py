"""Tile classes of long masks against FlexAttention's block mask, in one run: docs/tile_classes.md.

python benchmarks/tile_classes.py [docs/tile_classes.md]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask

from reattend.compiler.symbol_text import parse
from reattend.compiler.tiles import FULL, PARTIAL, tiles_of

TILE = 64
MASKS: dict[str, tuple[str, Callable[..., Any]]] = {
    "window 256 + 4 sinks": (
        "(j <= i) & ((i <= j + 255) | (j <= 3))",
        lambda b, h, i, j: (j <= i) & ((i <= j + 255) | (j <= 3)),
    ),
    "causal": ("j <= i", lambda b, h, i, j: j <= i),
    "blocks of 1,024": ("i // 1024 == j // 1024", lambda b, h, i, j: i // 1024 == j // 1024),
}


def main() -> None:
    rows = [against_flex(name, 16384) for name in MASKS]
    rows += [alone(name, 1 << 20) for name in ("window 256 + 4 sinks", "causal")]
    text = page(rows)
    print(text)
    for path in sys.argv[1:]:
        Path(path).write_text(text, encoding="utf-8")


def against_flex(name: str, n: int) -> dict[str, Any]:
    """Both classify every tile; the block mask's lists are compared with ours."""
    text, function = MASKS[name]
    ours, theirs = [], []
    for _ in range(3):
        theirs.append(seconds(lambda: create_block_mask(function, None, None, n, n, device="cpu", BLOCK_SIZE=TILE)))
        ours += [seconds(lambda: tiles_of(parse(text), n, n, (TILE, TILE))) for _ in range(5)]
    block = create_block_mask(function, None, None, n, n, device="cpu", BLOCK_SIZE=TILE)
    found = tiles_of(parse(text), n, n, (TILE, TILE)).classes()
    assert torch.equal(listed(block.kv_num_blocks, block.kv_indices), found == PARTIAL), name
    assert torch.equal(listed(block.full_kv_num_blocks, block.full_kv_indices), found == FULL), name
    return row(name, n, text, ours) | {"flex": statistics.median(theirs)}


def listed(count: Any, indices: Any) -> torch.Tensor:
    """A block mask's lists as truth of every tile."""
    count, indices = count[0, 0], indices[0, 0].long()
    inside = torch.arange(indices.shape[1]) < count.unsqueeze(1)
    return torch.zeros(indices.shape, dtype=torch.int32).scatter_add(1, indices, inside.int()).bool()


def alone(name: str, n: int) -> dict[str, Any]:
    text, _ = MASKS[name]
    return row(name, n, text, [seconds(lambda: tiles_of(parse(text), n, n, (TILE, TILE))) for _ in range(21)])


def row(name: str, n: int, text: str, ours: list[float]) -> dict[str, Any]:
    found = tiles_of(parse(text), n, n, (TILE, TILE))
    kept = [found.seen] if isinstance(found.seen, torch.Tensor) else [found.seen.first, found.seen.last]
    if found.full is not None:
        kept += [found.full.first, found.full.last]
    size = sum(t.numel() * t.element_size() for t in kept)
    return {"name": name, "n": n, "ours": statistics.median(ours), "bytes": size, "counts": found.counts}


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def page(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Tile classes",
        "",
        f"Made by `python benchmarks/tile_classes.py docs/tile_classes.md` on {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}:",
        f"tiles of {TILE}, medians of one run; a predicate's formulas are derived once and kept. Our classes equal",
        "the lists of `create_block_mask` tile by tile; at 1,048,576 its 2^40 pairs do not fit any memory.",
        "",
        "| mask | N | empty / cut / whole tiles | ours, ms | kept, bytes | create_block_mask, ms | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        flex = f"{1e3 * r['flex']:,.0f} | {r['flex'] / r['ours']:,.0f} x" if "flex" in r else "- | -"
        counts = " / ".join(f"{c:,}" for c in r["counts"])
        lines.append(f"| {r['name']} | {r['n']:,} | {counts} | {1e3 * r['ours']:.2f} | {r['bytes']:,} | {flex} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
