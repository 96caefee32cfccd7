"""What a recipe inserts stands on the residual stream: before a block reads it, or beside it behind the attention.

before   s ──[f]── LN ── attention ── + s         s becomes f(s)
behind   s + attention(LN(s)) ── t ──[+ f(LN(t))]──    LN is new, at its start plain
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx
from torch.nn.functional import layer_norm

from .mechanism import Aux, Mechanism, Param
from .ports import walk_back
from .primitives.rows import as_type, widened
from .program import Program
from .refusal import Refused
from .site import Grid, Site
from .starts import constant
from .surgery import residual_sum

_FAR = 256  # nodes between an attention and the stream that its block reads
_NORM = ("norm_weight", "norm_bias")


@dataclass(frozen=True, repr=False)
class OnStream(Mechanism):
    """An inserted mechanism as what it makes of the stream: f(x), or x + f(LN(x)); of pictures (B, h, w, C) as well."""

    inner: Mechanism
    training: bool = False  # what takes statistics of a batch does so in graphs of train() alone

    part = "insert"

    @property
    def slug(self) -> str:  # type: ignore[override]
        return self.inner.slug

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.inner.kind

    @property
    def stands(self) -> str:  # type: ignore[override]
        return self.inner.stands

    def __repr__(self) -> str:
        return repr(self.inner)

    def wanted_ports(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        must, may = self.inner.wanted_ports()
        return must, tuple(port for port in may if port != "train")

    def refuses(self, site: Site, dropped: frozenset[str] = frozenset()) -> str | None:
        return self.inner.refuses(site, dropped)

    def params(self, site: Site) -> Mapping[str, Param]:
        wide = (site.width,)
        norm = (Param(wide, constant(1.0)), Param(wide)) if self.stands == "behind" else ()
        return {**self.inner.params(site), **dict(zip(_NORM, norm, strict=False))}

    def buffers(self, site: Site) -> Mapping[str, Param]:
        return self.inner.buffers(site)

    def forward(self, site: Any, p: Any, x: Tensor, **ports: Tensor) -> Any:
        rows = x.flatten(1, -2)
        if self.training and "train" in self.inner.wanted_ports()[1]:
            ports["train"] = x.new_ones(())
        beside = self.stands == "behind"
        answer = self.inner.forward(site, p, x=_normed(rows, p) if beside else rows, **ports)
        found, aux = answer if isinstance(answer, tuple) else (answer, Aux())
        return (rows + found if beside else found).view_as(x), aux


def _normed(rows: Tensor, p: Any) -> Tensor:
    weight, bias = (widened(getattr(p, name)) for name in _NORM)
    return as_type(layer_norm(widened(rows), rows.shape[-1:], weight, bias), rows.dtype)


def stream_at(program: Program, path: str, mechanism: Mechanism) -> fx.Node:
    """The value that an inserted mechanism reads: the stream as the block gets it, or with its attention added."""
    if not mechanism.stands:
        fits = f"reattend.module({mechanism.slug!r}) where it belongs"
        raise Refused(f"{mechanism.slug} has no place of its own on the residual stream", where=path, fits=fits)
    stream, added = residual_sum(program, path)
    if walk_back(program.ports[path].attend, lambda node: stream in node.all_input_nodes, _FAR) is None:
        found = "what its output is added to is not what the attention reads"
        raise Refused(found, where=path, fits="a block x + W_o(attention(x))")
    return stream if mechanism.stands == "before" else added


def on_stream(site: Site, stream: Tensor) -> Site:
    """The site as an inserted mechanism sees it: the tokens, width and grid of the stream."""
    *_, width = stream.shape
    if stream.ndim == 4 and all(isinstance(size, int) for size in stream.shape[1:]):
        _, height, wide, _ = stream.shape
        return replace(site, queries=str(height * wide), width=width, grid=Grid(height, wide))
    tokens = str(stream.shape[1])
    if stream.ndim != 3 or tokens != site.queries:
        found = f"its residual stream is ({', '.join(map(str, stream.shape))}), its tokens are {site.queries}"
        raise Refused(found, where=site.path, fits="a stream (B, N, C) of the tokens that attend, or (B, h, w, C)")
    return replace(site, width=width)
