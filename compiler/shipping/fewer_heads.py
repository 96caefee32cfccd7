"""Key heads that were joined, as a stock model that has fewer of them: W_k and W_v shrunk, one entry of its config."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.groups import Group, find_groups, group
from ..algebra.moves import Move
from ..algebra.rewrites import Average
from ..hosting import about, original
from ..program import Change
from ..refusal import Refused

CONFIG = "num_key_value_heads"


def joined(work: Any) -> tuple[Change, ...]:
    """The changes that join key heads, where each says that smaller weights compute the same; else nothing."""
    if work is None or work.first is None:
        return ()
    changes = work.first.outcome.program.changes
    return tuple(changes) if all(c.mechanism.key_heads(c.site) for c in changes) else ()


def why_not_fewer(fast: Any, changes: tuple[Change, ...]) -> str:
    """Why the stock class has no such model, or ""."""
    sites = about(fast).first.outcome.reference.sites
    counts = {c.mechanism.key_heads(c.site) or 0 for c in changes}
    if len(changes) < len(sites) or len(counts) > 1:
        return f"{len(changes)} of {len(sites)} sites have {sorted(counts)} key heads; {CONFIG} is one number for all"
    if not isinstance(getattr(fast.config, CONFIG, None), int):
        return f"the config of a {type(fast).__name__} has no {CONFIG}"
    try:
        for heads in _heads(fast, changes):
            heads.check("permute")
    except Refused as refused:
        return str(refused)
    return ""


def with_fewer_heads(fast: Any, changes: tuple[Change, ...]) -> nn.Module:
    """A new stock model of the same class: its weights hold the key heads that are left."""
    stock: Any = original(fast)
    state: dict[str, Tensor] = dict(stock.state_dict())
    gone: dict[tuple[str, int], set[int]] = {}
    count = 0
    for change, heads in zip(changes, _heads(fast, changes), strict=True):
        count = change.mechanism.key_heads(change.site) or heads.size
        picked = change.mechanism.picked(count, heads.size // count)
        if picked is None:
            state |= Move(heads, Average(count)).forward(state)
        for slot in heads.writes:
            units = slot.index().reshape(count, heads.size // count, -1)
            kept = {int(e) for g, own in enumerate(units) for e in own[picked[g] if picked else 0]}
            gone.setdefault((slot.weight, slot.axis), set()).update(set(slot.index().tolist()) - kept)
    for (name, axis), entries in gone.items():
        rest = torch.tensor([k for k in range(state[name].shape[axis]) if k not in entries])
        state[name] = state[name].index_select(axis, rest.to(state[name].device))
    config = copy.deepcopy(stock.config)
    setattr(config, CONFIG, count)
    made: nn.Module = type(stock)(config).to(next(stock.parameters()).dtype)
    made.load_state_dict(state)
    if hasattr(stock, "generation_config"):
        made.generation_config = stock.generation_config
    return made.train(stock.training)


def _heads(fast: Any, changes: tuple[Change, ...]) -> list[Group]:
    found = find_groups(about(fast).first.outcome.reference)
    return [group(found, "heads", change.site.path.partition("#")[0]) for change in changes]
