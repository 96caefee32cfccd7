"""Bi-level routing: regions choose the regions whose tokens their queries see (BiFormer, arXiv 2303.08810)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from ...compiler.functional import attention
from ...compiler.mechanism import Limit, Mechanism, Param, register
from ...compiler.primitives.attend import attend
from ...compiler.primitives.gather import gather
from ...compiler.primitives.group import group
from ...compiler.primitives.route import route
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.site import Site
from ...compiler.symbols import table
from .grid_windows import Cut, no_grid


@register("biformer")
@dataclass(frozen=True)
class BiFormer(Mechanism):
    """o = softmax(scale q kᵀ) v over the tokens of the topk regions of the query's region, + depthwise_conv(v).

    Regions are ranked by (mean q over a region) · (mean k over another), all heads together, without a gradient unless
    route_grad; equal ones by number. soft_routing multiplies their keys and values by the softmax of the kept scores.
    kv_pool avg or max pools them kv_pool_ratio x kv_pool_ratio within each region, after the choice.
    regions (R_h, R_w) makes regions of floor(h / R_h) x floor(w / R_w) tokens, or region_size says theirs. What the
    grid does not fill is masked; with pad_mode zero it is keys and values of 0 (the reference). Prefix tokens see all
    and are seen by all, and take no part in routing and convolution. The reference's scale is (H D) ** -0.5; here it is
    the site's. The convolution starts at 0, closest to softmax attention; lepe_kernel 0 leaves it out.

    >>> q, k, v = problem(16)
    >>> o = attention(q, k, v, "biformer", grid=(4, 4), regions=(2, 2), topk=4)
    >>> bool((o - attention(q, k, v, "softmax")).abs().max() < 1e-6)
    True
    """

    regions: tuple[int, int] = (7, 7)
    topk: int = 4
    region_size: tuple[int, int] | None = None
    lepe_kernel: int = 3
    soft_routing: bool = False
    route_grad: bool = False
    pad_mode: Literal["mask", "zero"] = "mask"
    kv_pool: Literal["none", "avg", "max"] = "none"
    kv_pool_ratio: int = 4

    part = "core"
    kind = "needs recovery"
    paper = "arXiv 2303.08810"
    heads_apart = False  # all heads choose together
    tries = (
        {"regions": (1, 2), "topk": 1},
        {"regions": (2, 1), "topk": 2, "soft_routing": True, "route_grad": True},
        {"region_size": (2, 3), "topk": 1, "pad_mode": "zero", "lepe_kernel": 0},
        {"regions": (1, 1), "topk": 1, "kv_pool": "max", "kv_pool_ratio": 1},
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "regions", tuple(self.regions))
        if self.region_size is not None:
            object.__setattr__(self, "region_size", tuple(self.region_size))
        if min(self.regions) < 1 or min(self.region_size or (1,)) < 1 or self.topk < 1:
            found = f"regions={self.regions}, region_size={self.region_size}, topk={self.topk}"
            raise Refused(found, where="biformer", fits="1 or more of each")
        if self.kv_pool not in ("none", "avg", "max") or self.kv_pool_ratio < 1:
            found = f"kv_pool={self.kv_pool!r}, kv_pool_ratio={self.kv_pool_ratio}"
            raise Refused(found, where="biformer", fits="none, avg or max; a ratio of 1 or more")
        if self.lepe_kernel < 0 or (self.lepe_kernel and self.lepe_kernel % 2 == 0):
            raise Refused(f"lepe_kernel={self.lepe_kernel}", where="biformer", fits="an odd number, or 0")

    def fits(self, site: Site) -> str | None:
        reason = no_grid(site, "biformer")
        if reason is None and self.topk > prod(self._cut(site).counts):
            counts = self._cut(site).counts
            return f"topk={self.topk} of {counts[0]} x {counts[1]} regions"
        if reason is None and self.kv_pool != "none" and self.kv_pool_ratio > min(self._cut(site).h, self._cut(site).w):
            return f"kv_pool_ratio={self.kv_pool_ratio} in regions of {self._cut(site).h} x {self._cut(site).w} tokens"
        return reason

    def _cut(self, site: Any) -> Cut:
        h, w = self.region_size or (max(1, site.grid.h // self.regions[0]), max(1, site.grid.w // self.regions[1]))
        return Cut(site.grid, h, w)

    def params(self, site: Site) -> Mapping[str, Param]:
        if not self.lepe_kernel:
            return {}
        channels = site.heads * site.v_dim
        return {
            "lepe_weight": Param((channels, 1, self.lepe_kernel, self.lepe_kernel)),
            "lepe_bias": Param((channels,)),
        }

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        cut, prefix = self._cut(site), site.grid.prefix
        rows = cut.rows(q.device)
        rows = torch.where(rows < 0, -1, rows + prefix)
        chosen, scores = self._routed(q, k, rows, site.scale)
        pooled_k, pooled_v, cells = (k, v, rows) if self.kv_pool == "none" else self._pooled(k, v, rows, cut)
        o = self._attended(q, pooled_k, pooled_v, rows, cells, chosen, scores, prefix, site.scale)
        o = gather(o, cut.back(q.device))
        if prefix:
            o = torch.cat((attend(q[:, :, :prefix], k, v, scale=site.scale), o), 2)
        return o + self._convolved(site, p, v) if self.lepe_kernel else o

    def _routed(self, q: Tensor, k: Tensor, rows: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """The topk regions of every region, one choice for all heads: numbers and scores (B, R, topk)."""
        wide = torch.promote_types(q.dtype, torch.float32)
        if not self.route_grad:
            q, k = q.detach(), k.detach()
        mean_q, mean_k = (group(t.to(wide), rows, combine="mean")[0].transpose(1, 2).flatten(2) for t in (q, k))
        return route(scale * mean_q @ mean_k.mT, self.topk)

    def _pooled(self, k: Tensor, v: Tensor, rows: Tensor, cut: Cut) -> tuple[Tensor, Tensor, Tensor]:
        """Prefix keys and one key for each whole square of a region; which of them are in each region (R, squares)."""
        r, prefix = self.kv_pool_ratio, cut.grid.prefix
        inside = rows.unflatten(1, (cut.h, cut.w))[:, : cut.h // r * r, : cut.w // r * r]
        squares = inside.unflatten(2, (-1, r)).unflatten(1, (-1, r)).transpose(2, 3).flatten(3).flatten(0, 2)
        both, held = group(torch.cat((k, v), -1), squares)  # (B, H, all squares, r * r, D + Dv)
        held = (held if self.pad_mode == "mask" else torch.ones_like(held))[..., None]
        if self.kv_pool == "avg":
            pooled = (both * held).sum(3) / held.sum(3).clamp(min=1)
        else:
            pooled = torch.where(held, both, -torch.inf).amax(3)
            pooled = torch.where(held.any(3), pooled, 0.0)
        pooled = torch.cat((torch.cat((k, v), -1)[:, :, :prefix], pooled.to(k.dtype)), 2)
        numbers = torch.arange(squares.shape[0], device=k.device) + prefix
        cells = torch.where((squares >= 0).any(1), numbers, -1).unflatten(0, (rows.shape[0], -1))
        return *pooled.split([k.shape[3], v.shape[3]], 3), cells

    def _attended(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rows: Tensor,
        cells: Tensor,
        chosen: Tensor,
        scores: Tensor,
        prefix: int,
        scale: float,
    ) -> Tensor:
        """Every region as a sample of its own (B, H, R * tokens, D)."""
        count, size = cells.shape
        keys = cells[chosen.flatten()].view(-1, 1, count, self.topk * size)
        front = torch.arange(prefix, device=q.device).expand(keys.shape[0], 1, count, prefix)
        keys = torch.cat((keys, front), -1)
        near_k, held = group(k, keys)
        near_v = group(v, keys)[0]
        if self.soft_routing:
            shares = scores.softmax(-1).repeat_interleave(size, -1)[:, None, :, :, None]
            shares = torch.cat((shares, torch.ones_like(shares[:, :, :, :1]).expand(-1, -1, -1, prefix, -1)), 3)
            near_k, near_v = ((t * shares).to(q.dtype) for t in (near_k, near_v))
        flags = table((held | (keys < 0) if self.pad_mode == "zero" else held)[:, 0].flatten(0, 1))
        own = [t.transpose(1, 2).flatten(0, 1) for t in (group(q, rows)[0], near_k, near_v)]
        o = attend(own[0], own[1], own[2], scale=scale, keep=lambda b, j: flags[b, j])
        return o.unflatten(0, (-1, count)).transpose(1, 2).flatten(2, 3)

    def _convolved(self, site: Any, p: Any, v: Tensor) -> Tensor:
        """Depthwise convolution of v on the picture, channels counted head by head; prefix rows get 0."""
        prefix = site.grid.prefix
        image = v[:, :, prefix:].mT.flatten(1, 2).unflatten(2, (site.grid.h, site.grid.w))
        image = conv2d(image, p.lepe_weight, p.lepe_bias, padding=self.lepe_kernel // 2, groups=image.shape[1])
        return pad(image.flatten(2).unflatten(1, v.shape[1::2]).mT, (0, 0, prefix, 0))

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(12)
        softmax = lambda: attention(q, k, v, "softmax")
        yield Limit("all regions are full attention",
                    lambda: attention(q, k, v, BiFormer((2, 2), 6), grid=(3, 4)), softmax)  # fmt: skip
        yield Limit("one region is full attention",
                    lambda: attention(q, k, v, BiFormer((1, 1), 1), grid=(3, 4)), softmax)  # fmt: skip
        delta = torch.zeros(32, 1, 3, 3)
        delta[:, :, 1, 1] = 1.0
        yield Limit("a convolution that passes v on adds v",
                    lambda: attention(q, k, v, BiFormer((1, 1), 1), grid=(3, 4), params={"lepe_weight": delta}),
                    lambda: attention(q, k, v, "softmax") + v)  # fmt: skip
