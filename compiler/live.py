"""A live site: a site's facts together with its tensors, as a mechanism's `forward` sees them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from .primitives.attend import run
from .primitives.attend_asked import Asked
from .primitives.attend_spec import AttendSpec
from .primitives.attend_texts import (
    INDICES,
    ROW_INDICES,
    after_text,
    segment_texts,
    source_texts,
    terms_of,
    weight_text,
    with_terms,
)
from .primitives.tables import Tables
from .site import Grid, Site
from .symbol_text import parse
from .symbols import TRUE, name

KEPT = frozenset({"bias", "softcap", "sinks", "padding", "packed", "mask", "window", "dropout"})  # by attend(site=...)


@dataclass(frozen=True)
class LiveSite:
    """Reads like its `Site` (site.heads, site.causal, site.scale, site.grid ...) and knows what its own score had."""

    facts: Site
    spec: AttendSpec  # the attention that stands here before the rewrite, honoured features only
    tables: tuple[Tensor, ...] = ()
    ports: Mapping[str, Tensor] = field(default_factory=dict)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(object.__getattribute__(self, "facts"), attribute)

    @property
    def grid(self) -> Grid | None:
        return self.facts.grid

    def attend(self, q: Tensor, asked: Asked) -> Any:
        """`attend` that starts from what stands here: its mask, scale, bias, softcap, sinks and positions are kept.

        Further segments are keys that did not stand here: they have the site's scale and only their own keep and score.
        """
        own, tables = self.spec, Tables(self.tables)
        scaled = name("s") * self.facts.scale
        more = tuple(segment_texts(tables, part, scaled, {}, causal=False) for part in asked.segments)
        kept = tables.text(asked.main.keep, INDICES, "keep", own.keep_expr)
        score = _score(tables, asked, own)
        after = _after(tables, asked, own)
        sources = source_texts(tables, asked)
        spec = replace(
            own,
            keep="" if kept == TRUE.text else kept,
            score=score,
            weight=weight_text(tables, asked),
            normaliser=asked.normaliser,
            eps=asked.eps,
            sink=tables.text(asked.sink, ROW_INDICES, "sink") or own.sink,
            after=after,
            more=(*own.more, *more),
            empty="" if asked.other_keys else own.empty,  # what the old keys gave says nothing of other ones
            outputs=tuple(asked.outputs),
            **{key: value for key, value in sources.items() if value},
        )
        return run(q, asked.kv, tables.tensors, spec)


def _score(tables: Tables, asked: Asked, own: AttendSpec) -> str:
    """The site's score, of q.k with the relative terms, and what the call makes of it."""
    score = own.score_expr.replace({"s": with_terms(asked)}) if asked.relative else own.score_expr
    return tables.text(asked.main.score, {"s": score, **INDICES, **terms_of(asked)}, "score") or score.text


def _after(tables: Tables, asked: Asked, own: AttendSpec) -> str:
    """What the site does to its weights, and the call after it."""
    weight = parse(own.after) if own.after else name("w")
    after = after_text(tables, asked, weight) or weight.text
    return "" if after == "w" else after
