"""Few query rows, many keys: programs share a block's tiles, and what they gathered is joined."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from ...compiler.cost import density
from ...compiler.primitives.attend_grouped import keys_of
from ...compiler.primitives.attend_spec import AttendSpec
from ...compiler.primitives.attend_stored import widths
from ...compiler.primitives.operator import Groups
from .arguments import Arguments
from .attend import Attend, joining, of_any_tables, refusal
from .blocks import Blocks, padded
from .launching import launched, target
from .roofline import best_shares, forward_work


def shares_of(groups: Groups, text: str, blocks: Blocks, rows: int) -> int:
    """How many programs should share the keys of a head whose `rows` rows are one block; 1: none do."""
    (q,), kv, tables = groups
    if rows > blocks.rows or why_not_shared(text):
        return 1
    keys = max(keys_of(kv[0], AttendSpec.of(text), tables), *(k.shape[2] for k in kv[2::2]), 1)
    sizes = (
        *q.shape,
        widths(kv, AttendSpec.of(text))[1],
        1 << (keys - 1).bit_length(),
    )  # decided anew when the keys have doubled
    return _decided(text, sizes, q.shape[1] * q.shape[2] // rows, blocks, target(q))


@lru_cache(maxsize=1024)
def _decided(text: str, sizes: tuple[int, ...], heads: int, blocks: Blocks, target: str) -> int:
    B, H, N, D, E, keys = sizes
    kept = density(text, N, keys)
    work = forward_work(B, H, heads, N, keys, D, E, kept)
    tiles = max(1, round(keys * kept / blocks.keys))
    return best_shares(work, B * heads, tiles, B * H * N * (E + 2), blocks, target)


@lru_cache(maxsize=1024)
def why_not_shared(text: str) -> str | None:
    """Why the keys of a spec cannot be shared among programs; None where they can."""
    return "listed tiles" if AttendSpec.of(text).tiles else refusal(lambda: joining(of_any_tables(text)))


def in_shares(kernel: Attend, given: Arguments, made: Arguments, programs: int, count: int) -> None:
    """Two launches: what each share of the keys gives, and the results of all."""
    q: Tensor = given["Q"]
    rows, shared = q.shape[0] * q.shape[1] * q.shape[2], replace(kernel, shared=True)
    gathered = {
        name: q.new_empty(count * rows * (given["E"] if name == "OF_o" else 1), dtype=torch.float32)
        for name in kernel.gathered
    }
    launched(shared.source, shared.name, (programs, count), given | gathered | {"R": rows})
    block = max(1, min(64, 4096 // padded(given["E"])))
    own = {name: given[name] for name in (*kernel.looked_up, "H", "N", "shift", "E", "EP")}
    if kernel.spec.q_positions:
        own |= {name: given[name] for name in ("at_q", "at_q_b", "at_q_h", "at_q_n")}
    own |= {**made, **gathered, "R": rows, "SHARES": count, "BM": block, "num_warps": 4}
    launched(joining(kernel), "join", (-(-rows // block),), own)
