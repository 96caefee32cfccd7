"""How many bytes the states of causal sites hold when a sequence has been seen: keys and values, rings, scan states."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from .decode_derived import way_of
from .decode_ways import KeptKeys, ScanState, standing
from .kv_rows import KVRows
from .mechanism import Mechanism
from .program import Change
from .refusal import Refused
from .site import Site


def cache_bytes(sites: Sequence[Site], changes: Mapping[str, Sequence[Change]], *, batch: int, tokens: int,
                dtype: torch.dtype) -> int:  # fmt: skip
    """Over all causal sites after `tokens`; where a mechanism's state is not known, keys and values are counted."""
    known: dict[tuple[Mechanism, Site, int], int] = {}
    total = 0
    for site in sites:
        if site.pattern != "causal-self":
            continue
        own = {c.mechanism.part: c for c in changes.get(site.path, ())}
        row = _row_bytes(site, own.get("cache"), dtype)
        if "core" not in own:
            total += batch * site.kv_heads * tokens * row
            continue
        asked = (own["core"].mechanism, replace(site, path="", index=0, weights=()), row)
        if asked not in known:
            known[asked] = _after(own["core"], site, batch, tokens, dtype, row)
        total += known[asked]
    return total


def _row_bytes(site: Site, change: Change | None, dtype: torch.dtype) -> int:
    """Of one token's key and value in one head."""
    if change is not None and isinstance(change.mechanism, KVRows):
        return change.mechanism.row_bytes(site)
    return (site.dim + site.v_dim) * dtype.itemsize


def _after(change: Change, site: Site, batch: int, tokens: int, dtype: torch.dtype, row: int) -> int:
    """What the derived way of decoding keeps: some keys, or a state in float32 that does not grow."""
    try:
        way = way_of(standing(change.mechanism, site))
    except Refused:
        return batch * site.kv_heads * tokens * row
    if isinstance(way, ScanState):
        return batch * math.prod(way.size) * torch.promote_types(dtype, torch.float32).itemsize
    kept = way.bound.kept if isinstance(way, KeptKeys) else None
    return batch * site.kv_heads * (tokens if kept is None else min(tokens, kept)) * row
