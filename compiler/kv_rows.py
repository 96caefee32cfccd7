"""What a recipe's `kv` key asks for: keys and values that are stored in few bits, read as what they come back as.

At a site every reader of k and v reads them as they come back from storage, cached or not, so that decoding equals
prefill. Where a cache is an argument, `compiler/held_rows.py` makes it hold the stored form.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .mechanism import Mechanism
from .primitives.attend import attend
from .primitives.packed_rows import RowSpec, stored
from .site import Site


class KVRows(Mechanism):
    """Base of such mechanisms: they say how a row is stored."""

    part = "cache"
    kind = "approximate"
    bits = 8

    def group(self, dim: int) -> int:
        """How many channels of a row of `dim` share a scale; 0: all."""
        return 0

    def spec(self, dim: int, dtype: str) -> RowSpec:
        return RowSpec(self.bits, dim, self.group(dim), dtype)

    def store(self, rows: Tensor) -> Tensor:
        """Rows as they come back from storage."""
        return stored(rows, self.spec(int(rows.shape[-1]), str(rows.dtype).removeprefix("torch.")))

    def row_bytes(self, site: Site) -> int:
        """Of one token's key and value in one head."""
        return sum(self.spec(dim, "float32").bytes for dim in (site.dim, site.v_dim))

    def fits(self, site: Site) -> str | None:
        hidden = site.self_attention and site.features & {"mask", "packed"}  # causal by a mask that says more than that
        if site.pattern != "causal-self" and not hidden:
            return f"{self.slug} stores the keys of causal self-attention, this site is {site.pattern}"
        return None

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, self.store(k), self.store(v), site=site)
