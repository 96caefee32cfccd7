"""How many bytes the states of causal sites hold when a sequence has been seen: keys and values, rings, scan states."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from .decode_derived import way_of
from .decode_ways import KeptKeys, ScanState, standing
from .mechanism import Mechanism
from .program import Change
from .refusal import Refused
from .site import Site


def cache_bytes(sites: Sequence[Site], changes: Mapping[str, Sequence[Change]], *, batch: int, tokens: int,
                dtype: torch.dtype) -> int:  # fmt: skip
    """Over all causal sites after `tokens`; where a mechanism's state is not known, keys and values are counted."""
    known: dict[tuple[Mechanism, Site], int] = {}
    total = 0
    for site in sites:
        if site.pattern != "causal-self":
            continue
        core = next((c for c in changes.get(site.path, ()) if c.mechanism.part == "core"), None)
        if core is None:
            total += _all_keys(site, batch, tokens, dtype)
            continue
        asked = (core.mechanism, replace(site, path="", index=0, weights=()))
        if asked not in known:
            known[asked] = _after(core, site, batch, tokens, dtype)
        total += known[asked]
    return total


def _all_keys(site: Site, batch: int, rows: int, dtype: torch.dtype) -> int:
    return batch * site.kv_heads * rows * (site.dim + site.v_dim) * dtype.itemsize


def _after(change: Change, site: Site, batch: int, tokens: int, dtype: torch.dtype) -> int:
    """What the derived way of decoding keeps: some keys, or a state in float32 that does not grow."""
    try:
        way = way_of(standing(change.mechanism, site))
    except Refused:
        return _all_keys(site, batch, tokens, dtype)
    if isinstance(way, ScanState):
        return batch * math.prod(way.size) * torch.promote_types(dtype, torch.float32).itemsize
    kept = way.bound.kept if isinstance(way, KeptKeys) else None
    return _all_keys(site, batch, tokens if kept is None else min(tokens, kept), dtype)
