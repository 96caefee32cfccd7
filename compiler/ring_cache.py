"""A transformers cache whose layers keep what later tokens can still reach: sinks, and a ring of the latest keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from .decode_derived import way_of
from .decode_ways import KeptKeys, standing
from .hosted import about
from .positions import positions
from .primitives.attend_spec import AttendSpec
from .program import Change
from .reach import Reach, kept_keys, reach
from .refusal import Refused
from .site import Site


class RingLayer(DynamicLayer):
    """The first `sinks` and the last `back` keys; `cumulative_length` counts all keys that ever came."""

    is_croppable = False
    is_ring = True

    def __init__(self, back: int, sinks: int) -> None:
        super().__init__()
        self.back, self.sinks, self.cumulative_length = back, sinks, 0

    @property
    def bound(self) -> Reach:
        return Reach(self.back, 0, self.sinks)

    @property
    def held(self) -> int:
        return int(self.keys.shape[-2]) if self.is_initialized and self.keys.numel() else 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What the new tokens see: the kept keys and their own; afterwards the layer holds what later ones can see."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self.cumulative_length += key_states.shape[-2]
        rows = kept_keys(keys.shape[-2], self.bound, keys.device)
        assert rows is not None  # a ring has a bound
        if len(rows) < keys.shape[-2]:
            self.keys, self.values = keys.index_select(-2, rows), values.index_select(-2, rows)
        return keys, values

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.held + query_length, self.cumulative_length - self.held

    def get_max_length(self) -> int:
        return self.bound.kept or 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise Refused("a ring cannot go back to keys that it dropped", where="crop", fits="DynamicCache()")

    def unrolled(self) -> DynamicLayer:
        """An ordinary layer of the same logical length: what the model is captured with."""
        layer = DynamicLayer()
        if self.held:
            sizes = (*self.keys.shape[:-2], self.cumulative_length, self.keys.shape[-1])
            values = (*self.values.shape[:-2], self.cumulative_length, self.values.shape[-1])
            layer.update(self.keys.new_zeros(sizes), self.values.new_zeros(values))
        return layer


def ring_cache(fast: nn.Module) -> DynamicCache:
    """An empty cache for `fast.generate(past_key_values=...)`: rings where the rewritten site has a bound."""
    work = about(fast)
    if work is None or work.first is None:
        raise Refused(
            f"a {type(fast).__name__} that was not optimized", where="ring_cache", fits="optimize(model, ...)"
        )
    program = work.first.outcome.program
    changes = {c.site.path: c for c in program.changes if c.mechanism.part in ("core", "region")}
    config: Any = fast.config
    layers: list[Any] = [DynamicLayer() for _ in range(config.get_text_config(decoder=True).num_hidden_layers)]
    known: dict[Any, Reach] = {}
    for site, place in zip(program.sites, positions(program.sites), strict=True):
        change = changes.get(site.path)
        key = (repr(change and change.mechanism), change and change.setting.signature, site.mask)
        if key not in known:
            known[key] = _bound(site, change)
        if known[key].back is not None and place.layer is not None and place.layer < len(layers):
            if isinstance(layers[place.layer], RingLayer):
                found = f"several attentions in layer {place.layer}"
                raise Refused(found, where="ring_cache", fits="one cached attention per layer")
            layers[place.layer] = RingLayer(max(known[key].back or 0, 0), known[key].sinks)
    cache = DynamicCache()
    cache.layers = layers
    return cache


def _bound(site: Site, change: Change | None) -> Reach:
    """What a later token can reach at a site, decoding being causal; no bound where that cannot be derived."""
    conditions = [c.text for c in AttendSpec("s", site.mask).conjuncts if c.op != "lookup" and c.names <= {"i", "j"}]
    plain = [text for text in conditions if reach(AttendSpec("s", text).text) != Reach()]
    spec = AttendSpec(f"s * {site.scale!r}", " & ".join(f"({text})" for text in {*plain, "j <= i"}))
    spec = AttendSpec(spec.score, spec.keep_expr.text)
    if change is None:
        return reach(spec.text)
    own = {n.removeprefix("param_"): t.detach().float().cpu() for n, t in change.own.items()}
    facts = {"pattern": "causal-self", "features": frozenset()}
    try:
        way = way_of(standing(change.mechanism, _with(site, facts), own, spec))
    except Refused:
        return Reach()
    return way.bound if isinstance(way, KeptKeys) else Reach()


def _with(site: Site, facts: dict[str, Any]) -> Site:
    return Site(**{**{n: getattr(site, n) for n in site.__dataclass_fields__}, **facts})


def held_bytes(cache: Any) -> int:
    """The memory of a cache's keys and values."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if isinstance(t, torch.Tensor)]
    return sum(t.untyped_storage().nbytes() for t in tensors)
