"""The transformers cache that an optimized model decodes with: for each layer what its attention says is enough."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from .decode_derived import way_of
from .decode_ways import KeptKeys, ScanState, standing
from .hosted import about
from .positions import positions
from .primitives.attend_spec import AttendSpec
from .program import Change
from .reach import Reach, reach
from .refusal import Refused
from .ring_cache import RingLayer
from .site import Site
from .state_cache import StateLayer


def cache_for(fast: nn.Module) -> DynamicCache:
    """An empty cache for `fast.generate(past_key_values=...)`.

    A ring where the keys in reach are bounded, a state where the rewritten site is one scan, else ordinary rows.
    """
    work = about(fast)
    if work is None or work.first is None:
        raise Refused(f"a {type(fast).__name__} that was not optimized", where="cache_for", fits="optimize(model, ...)")
    program = work.first.outcome.program
    changes = {c.site.path: c for c in program.changes if c.mechanism.part in ("core", "region")}
    stored = {c.site.path for c in program.changes if c.mechanism.part == "cache"}
    config: Any = fast.config
    layers: list[Any] = [DynamicLayer() for _ in range(config.get_text_config(decoder=True).num_hidden_layers)]
    known: dict[Any, Any] = {}
    for site, place in zip(program.sites, positions(program.sites), strict=True):
        change = changes.get(site.path)
        key = (repr(change and change.mechanism), change and change.setting.signature, site.mask)
        if key not in known:
            known[key] = _kept(site, change)
        kept = known[key]
        if kept is StateLayer and site.path in stored:  # its rows are asked for, in bytes
            continue
        if kept == Reach() or place.layer is None or place.layer >= len(layers):
            continue
        if type(layers[place.layer]) is not DynamicLayer:
            found = f"several attentions in layer {place.layer}"
            raise Refused(found, where="cache_for", fits="one cached attention per layer")
        layers[place.layer] = StateLayer() if kept is StateLayer else RingLayer(max(kept.back, 0), kept.sinks)
    cache = DynamicCache()
    cache.layers = layers
    return cache


def _kept(site: Site, change: Change | None) -> Any:
    """What a later token asks of a site, decoding being causal: StateLayer, or a reach; no bound where none follows."""
    conditions = [c.text for c in AttendSpec("s", site.mask).conjuncts if c.op != "lookup" and c.names <= {"i", "j"}]
    plain = [text for text in conditions if reach(AttendSpec("s", text).text) != Reach()]
    spec = AttendSpec(f"s * {site.scale!r}", " & ".join(f"({text})" for text in {*plain, "j <= i"}))
    spec = AttendSpec(spec.score, spec.keep_expr.text)
    if change is None:
        return _bounded(reach(spec.text))
    own = {n.removeprefix("param_"): t.detach().float().cpu() for n, t in change.own.items()}
    facts = {"pattern": "causal-self", "features": frozenset()}
    try:
        way = way_of(standing(change.mechanism, _with(site, facts), own, spec))
    except Refused:
        return Reach()
    if isinstance(way, ScanState):
        return StateLayer
    return _bounded(way.bound) if isinstance(way, KeptKeys) else Reach()


def _bounded(found: Reach) -> Reach:
    return found if found.back is not None else Reach()


def _with(site: Site, facts: dict[str, Any]) -> Site:
    return Site(**{**{n: getattr(site, n) for n in site.__dataclass_fields__}, **facts})


def held_bytes(cache: Any) -> int:
    """The memory of a cache's keys and values, or of what it keeps in their place."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if isinstance(t, torch.Tensor)]
    return sum(t.untyped_storage().nbytes() for t in tensors)
