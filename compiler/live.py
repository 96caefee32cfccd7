"""A live site: a site's facts together with its tensors, as a mechanism's `forward` sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from .primitives.attend import Relative, Segment, Tables, Tiles, run, segment_texts, source_texts, with_terms
from .primitives.attend_spec import AttendSpec
from .site import Grid, Site
from .symbol_text import parse
from .symbols import TRUE, Expr, name

KEPT = frozenset({"bias", "softcap", "sinks", "padding", "packed", "mask", "window", "dropout"})  # by attend(site=...)
_INDICES = {n: name(n) for n in ("b", "h", "i", "j", "N", "M")}


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

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        keep: Callable[..., Any] | None = None,
        score: Callable[..., Any] | None = None,
        weight: Callable[..., Any] | None = None,
        normaliser: str = "softmax",
        eps: float = 0.0,
        sink: Callable[..., Any] | None = None,
        after: Callable[..., Any] | None = None,
        leader: Callable[..., Any] | None = None,
        relative: Sequence[Relative] = (),
        tiles: Tiles | None = None,
        kv_heads: Tensor | None = None,
        rows: Tensor | None = None,
        segments: Sequence[Segment] = (),
        outputs: Sequence[str] = ("o",),
    ) -> Any:
        """`attend` that starts from what stands here: its mask, scale, bias, softcap, sinks and positions are kept.

        Further segments are keys that did not stand here: they have the site's scale and only their own keep and score.
        """
        own = self.spec
        tables = Tables(self.tables)
        scaled = name("s") * self.facts.scale
        more = tuple(segment_texts(tables, part, scaled, causal=False) for part in segments)
        kept = tables.text(keep, _INDICES, "keep", own.keep_expr)
        terms = {f"r{number}": name(f"r{number}") for number in range(len(relative))}
        scored: Expr = own.score_expr.replace({"s": with_terms(relative)}) if relative else own.score_expr
        logits = tables.text(score, {"s": scored, **_INDICES, **terms}, "score") or scored.text
        done = parse(own.after) if own.after else name("w")
        left = tables.text(after, {"w": done, **_INDICES, **terms}, "after") or done.text
        refined = any((keep, score, segments, relative, tiles, leader, rows is not None, normaliser != "softmax"))
        sources = source_texts(tables, (Segment(k, v, rows=rows), *segments), relative, tiles, kv_heads, leader)
        spec = replace(
            own,
            keep="" if kept == TRUE.text else kept,
            score=logits,
            weight=tables.text(weight, {"s": name("s"), **{n: _INDICES[n] for n in ("b", "h", "i")}}, "weight"),
            normaliser=normaliser,
            eps=eps,
            sink=tables.text(sink, {n: _INDICES[n] for n in ("b", "h", "i")}, "sink") or own.sink,
            after="" if left == "w" else left,
            more=(*own.more, *more),
            empty="" if refined else own.empty,  # what the old keys gave says nothing of other ones
            outputs=tuple(outputs),
            **{key: value for key, value in sources.items() if value},
        )
        kv = [t for part in segments for t in (part.k, part.v)]
        return run(q, [k, v, *kv], tables.tensors, spec)
