"""Neighborhood attention: a query sees the keys around it on a 1-D, 2-D or 3-D grid (arXiv 2204.07143, 2504.16922)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from ...compiler.functional import attention
from ...compiler.live import KEPT
from ...compiler.mechanism import Limit, Mechanism, Param, register
from ...compiler.primitives.attend import attend
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.site import Site
from ...compiler.symbols import build, table
from .neighborhood_axis import Axis
from .neighborhood_tiles import plan


@register("neighborhood")
@dataclass(frozen=True)
class Neighborhood(Mechanism):
    """o_i = softmax over the keys that are near on every axis, and over all extra keys; `Axis` says what near is.

    >>> q, k, v = problem(12)
    >>> o = attention(q, k, v, "neighborhood", grid=(3, 4), window=(3, 2), stride=(3, 2))
    >>> left = [0, 1, 4, 5, 8, 9]  # windows as wide as their stride are blocks
    >>> block = attention(q[:, :, left], k[:, :, left], v[:, :, left], "softmax")
    >>> bool((o[:, :, left] - block).abs().max() < 1e-6)
    True

    One number for window, stride, dilation or causal holds for all axes. grid: (n,), (h, w) or (t, h, w), row-major;
    left out, it is the site's picture, else the tokens are one axis, which may then be shorter than the window.
    causal left out is that of the site. Prefix tokens (class, registers) see all and are seen by all, a bound on what
    a block of rows must read is lost with them. Ports extra_k, extra_v (B, Hkv, E, D): keys that everybody sees.
    rel_bias learns a table (H, 2 w - 1, ...) added to the scaled score, at (key - query) / dilation + w - 1 per axis.
    """

    window: int | tuple[int, ...] = 7
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] | None = None
    grid: tuple[int, ...] | None = None
    rel_bias: bool = False
    scale: float | None = None

    part = "core"
    kind = "approximate"
    honours = KEPT
    paper = "arXiv 2204.07143"
    also = {"kernel_size": "window"}
    tries = (
        {"window": 2},
        {"window": 3, "stride": 2, "rel_bias": True},
        {"window": (2, 4), "stride": (1, 4)},
        {"window": 2, "dilation": (1, 2)},
        {"window": 2, "causal": (True, False)},
    )

    def __post_init__(self) -> None:
        for knob in ("window", "stride", "dilation", "causal", "grid"):
            if isinstance(getattr(self, knob), list):
                object.__setattr__(self, knob, tuple(getattr(self, knob)))
        least = {"window": 2, "stride": 1, "dilation": 1, "grid": 1}
        for knob, low in least.items():
            value = getattr(self, knob)
            if value is not None and any(n < low for n in _each(value, 1)):
                raise Refused(f"{knob}={value}", where="neighborhood", fits=f"{knob} of {low} or more")
        many = {len(value) for value in (self.window, self.stride, self.dilation, self.causal, self.grid)
                if isinstance(value, tuple)}  # fmt: skip
        if len(many) > 1 or not many <= {1, 2, 3}:
            raise Refused("knobs of different axes", where="neighborhood", fits="1, 2 or 3 axes, the same everywhere")
        for w, s in zip(_each(self.window, 3), _each(self.stride, 3), strict=False):
            if s > w:
                raise Refused(f"stride {s} beyond window {w}", where="neighborhood", fits="1 <= stride <= window")

    def shape(self, site: Any) -> tuple[tuple[Any, ...], int]:
        """The size of every axis, and the number of prefix tokens."""
        if self.grid is not None:
            same = site.grid is not None and self.grid == (site.grid.h, site.grid.w)
            return self.grid, site.grid.prefix if same else 0
        if site.grid is not None:
            return (site.grid.h, site.grid.w), site.grid.prefix
        return (None,), 0

    def axes(self, site: Any) -> tuple[Axis, ...]:
        sizes, _ = self.shape(site)
        causal = site.causal if self.causal is None else self.causal
        knobs = [_each(value, len(sizes)) for value in (self.window, self.stride, self.dilation, causal)]
        return tuple(Axis(*one) for one in zip(sizes, *knobs, strict=True))

    def fits(self, site: Site) -> str | None:
        if not site.self_attention:
            return "a neighborhood lies around the query, this site is cross-attention"
        sizes, prefix = self.shape(site)
        for knob in ("window", "stride", "dilation", "causal"):
            value = getattr(self, knob)
            if isinstance(value, tuple) and len(value) != len(sizes):
                return f"{knob}={value} has {len(value)} axes, the grid here has {len(sizes)}: give grid"
        if sizes[0] is None:
            return self._extra(site)
        if site.keys.isdigit() and prod(sizes) + prefix != int(site.keys):
            return f"{site.keys} tokens are not a grid of {' x '.join(map(str, sizes))} and {prefix} prefix tokens"
        for axis in self.axes(site):
            if axis.far + axis.dilation > (axis.size or 0):
                found = f"window {axis.window} with dilation {axis.dilation}"
                return f"{found} is larger than the grid ({' x '.join(map(str, sizes))})"
        return self._extra(site)

    def _extra(self, site: Site) -> str | None:
        if "extra_k" in site.ports and (site.features - {"rope"} or site.causal):
            return "extra keys stand beside a site without mask and bias, this one is causal or has them"
        return None

    def explains(self, site: Site) -> Iterable[str]:
        size = int(site.keys) if site.keys.isdigit() else 0
        axes = [replace(axis, size=size) if axis.size is None else axis for axis in self.axes(site)]
        if all(axis.size and axis.window * axis.dilation <= axis.size for axis in axes):
            here = plan(axes)
            yield str(here)
            better = None if here.block_sparse else here.sparser() or here.near()
            yield from () if better is None else (f"block-sparse would be {better}",)

    def params(self, site: Site) -> Mapping[str, Param]:
        if not self.rel_bias:
            return {}
        spans = [2 * axis.window - 1 for axis in self.axes(site)]
        return {"rel_bias": Param((site.heads, *spans))}

    def forward(
        self,
        site: Any,
        p: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        extra_k: Tensor | None = None,
        extra_v: Tensor | None = None,
    ) -> Tensor:
        _, prefix = self.shape(site)
        if extra_k is not None and extra_v is not None:  # they stand in front, where a bound on what is read knows them
            count, scale = prefix + extra_k.shape[2], site.scale if self.scale is None else self.scale
            k, v = torch.cat((extra_k, k), 2), torch.cat((extra_v, v), 2)
            keep, score = self._rules(site, p, count, prefix)
            return attend(q, k, v, keep=keep, score=score, scale=scale, align="end")
        factor = 1.0 if self.scale is None else self.scale / site.scale
        keep, score = self._rules(site, p, prefix, prefix)
        return attend(q if factor == 1.0 else q * factor, k, v, keep=keep, score=score, site=site)

    def _rules(self, site: Any, p: Any, front: Any, prefix: int) -> tuple[Any, Any]:
        """keep(i, j) and score(s, h, i, j), the first `front` positions being keys of everybody."""
        axes = self.axes(site)
        steps = tuple(prod(axis.size or 1 for axis in axes[n + 1 :]) for n in range(len(axes)))
        biases = table(p.rel_bias) if self.rel_bias else None
        far = sum(axis.far * step for axis, step in zip(axes, steps, strict=True))

        def places(i: Any) -> list[Any]:
            """The coordinates of a position on the grid."""
            whole = [(i - front) // step if step > 1 else i - front for step in steps]
            return whole[:1] + [part % axis.size for part, axis in zip(whole[1:], axes[1:], strict=True)]

        def keep(i: Any, j: Any, M: Any) -> Any:
            near = _all(axis.near(x, y, M - front) for axis, x, y in zip(axes, places(i), places(j), strict=True))
            if prefix:
                return near | (j < front) | (i < front)
            band = i - j <= far
            return (near | (j < front)) & (band | (j < front)) & (j - i <= far) if front else near & (abs(i - j) <= far)

        def score(s: Any, h: Any, i: Any, j: Any) -> Any:
            index = [axis.offset(x, y) for axis, x, y in zip(axes, places(i), places(j), strict=True)]
            assert biases is not None
            bias = biases[(h, *index)]
            return s + (build("where", (i >= front) & (j >= front), bias, 0.0) if prefix or front else bias)

        return keep, score if self.rel_bias else None

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(12)
        softmax = lambda: attention(q, k, v, "softmax")
        flat = v[:, :, :1].expand_as(v)
        yield Limit("a window as large as the grid is full attention",
                    lambda: attention(q, k, v, Neighborhood((3, 4)), grid=(3, 4)), softmax)  # fmt: skip
        yield Limit("a causal window as large as the row is causal attention",
                    lambda: attention(q, k, v, Neighborhood(12), causal=True),
                    lambda: attention(q, k, v, "softmax", causal=True))  # fmt: skip
        yield Limit("windows as wide as their stride are blocks",
                    lambda: attention(q, k, v, Neighborhood(4, 4)),
                    lambda: attention(*_folded(q, k, v, (3, 4)), "softmax").unflatten(0, (2, 3)).transpose(1, 2)
                    .flatten(2, 3))  # fmt: skip
        yield Limit("dilation is the same attention on every second token",
                    lambda: attention(q, k, v, Neighborhood(3, dilation=2))[:, :, 1::2],
                    lambda: attention(q[:, :, 1::2], k[:, :, 1::2], v[:, :, 1::2], Neighborhood(3)))  # fmt: skip
        yield Limit("a constant v comes out", lambda: attention(q, k, flat, Neighborhood(3)), lambda: flat)


def _folded(q: Tensor, k: Tensor, v: Tensor, blocks: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of tokens as samples of their own."""
    q, k, v = (t.unflatten(2, blocks).transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    return q, k, v


def _each(value: Any, axes: int) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,) * axes


def _all(conditions: Iterable[Any]) -> Any:
    total: Any = True
    for condition in conditions:
        total = condition & total
    return total
