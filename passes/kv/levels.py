"""What stored keys and values share: groups that divide a head, and the rows that storing leaves as they are."""

from __future__ import annotations

import torch

from ...compiler.kv_rows import KVRows
from ...compiler.mechanism import Limit
from ...compiler.refusal import Refused


def groups_of(size: int, dim: int, slug: str) -> int:
    """A group size as a spec holds it (0: all of a row's channels), refused where it does not divide a head."""
    if size == -1 or size >= dim:
        return 0
    if size < 1 or dim % size:
        least = next((d for d in range(min(size, dim), 1, -1) if dim % d == 0), -1)
        fits = f"{slug}: {{kv_group_size: {least}}}"
        raise Refused(f"kv_group_size {size} does not divide heads of {dim}", fits=fits)
    return size


def kept_levels(chosen: KVRows) -> Limit:
    """Whole numbers that span exactly the levels there are come back as they were."""
    rows = torch.arange(3 * 16.0).view(1, 1, 3, 16) % 16 - 4
    rows[..., -1] = chosen.spec(16, "float32").most - 4
    return Limit("rows that lie on its levels are kept", lambda: chosen.store(rows), lambda: rows, atol=0.0)
