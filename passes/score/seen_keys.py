"""How many keys each row of a site may see: its own number where the site is causal, all of them where it is not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def seen_keys(site: Any, q: Tensor, k: Tensor, key_padding: Tensor | None = None) -> Tensor:
    """(B|1, N), in float32 or better, at least 1; the last query stands at the last key, hidden keys do not count."""
    n, m, wide = q.shape[2], k.shape[2], torch.promote_types(q.dtype, torch.float32)
    if key_padding is None:
        count = torch.arange(m - n + 1, m + 1, device=q.device) if site.causal else q.new_full((n,), m, dtype=wide)
        return count.to(wide)[None]
    real = key_padding.to(wide)
    count = real.cumsum(1)[:, m - n :] if site.causal else real.sum(1, keepdim=True).expand(-1, n)
    return count.clamp(min=1)
