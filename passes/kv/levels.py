"""Keys and values stored as whole numbers: how channels are grouped, and the rows that storing leaves as they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ...compiler.kv_rows import KVRows
from ...compiler.mechanism import Limit
from ...compiler.refusal import Refused


@dataclass(frozen=True)
class Levels(KVRows):
    kv_group_size: int = 128  # channels of a head that share a scale; all of them where there are fewer

    paper = "arXiv 2405.04532"

    def group(self, dim: int) -> int:
        """The group size as a spec holds it (0: all of a row's channels), refused where it does not divide a head."""
        size = self.kv_group_size
        if size == -1 or size >= dim:
            return 0
        if size < 1 or dim % size:
            least = next((d for d in range(min(size, dim), 1, -1) if dim % d == 0), -1)
            fits = f"{self.slug}: {{kv_group_size: {least}}}"
            raise Refused(f"kv_group_size {size} does not divide heads of {dim}", fits=fits)
        return size

    def limits(self) -> Iterable[Limit]:
        rows = torch.arange(3 * 16.0).view(1, 1, 3, 16) % 16 - 4
        rows[..., -1] = self.spec(16, "float32").most - 4
        yield Limit("rows that lie on its levels are kept", lambda: self.store(rows), lambda: rows, atol=0.0)
