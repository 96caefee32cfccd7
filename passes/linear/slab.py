"""Simplified linear attention: relu features, a learned place for every key, a convolution (SLAB, arXiv 2405.11582)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, pad

from ...compiler.functional import attention
from ...compiler.mechanism import Limit, Mechanism, Param, register
from ...compiler.on_grid import off_grid
from ...compiler.primitives.rows import as_type, repeat_heads, widened
from ...compiler.primitives.scan import scan
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.site import Site

UPSAMPLE = ("linear1d", "bilinear2d")


@register("slab")
@dataclass(frozen=True)
class Slab(Mechanism):
    """o_i = q'_i . (sum_j k'_j v_jᵀ) / (q'_i . sum_j k'_j + eps) + dwc(v)_i, q' = relu(q), k' = relu(k + pos_k).

    >>> q, k, v = problem(6)
    >>> w = torch.relu(q) @ torch.relu(k).mT
    >>> o = attention(q, k, v, "slab", grid=(2, 3))
    >>> torch.allclose(o, w @ v / (w.sum(-1, keepdim=True) + 1e-6), atol=1e-5)
    True

    pos_k (1, M, H * D) belongs to every key, the depthwise convolution dwc (D, 1, 5, 5) to every channel of a head, the
    same for all heads; both start at 0. A query without a positive channel gets the convolution alone. The site's scale
    is not used. kv_grid: the keys' own grid where they were spatially reduced; v is then resized before the
    convolution, along the sequence of tokens (linear1d, what the paper's code does) or on the grid (bilinear2d).
    Prefix tokens, which the paper's models do not have, take part in all but the convolution.
    """

    eps: float = 1e-6
    dwc_kernel: int = 5
    upsample: str = "bilinear2d"
    kv_grid: tuple[int, int] | None = None

    part = "core"
    kind = "needs recovery"
    honours = frozenset[str]()
    paper = "arXiv 2405.11582"
    tries = ({}, {"dwc_kernel": 3, "eps": 1e-3})

    def __post_init__(self) -> None:
        if self.dwc_kernel < 1 or self.dwc_kernel % 2 == 0:
            raise Refused(f"dwc_kernel={self.dwc_kernel}", where="slab", fits="an odd number")
        if self.upsample not in UPSAMPLE:
            raise Refused(f"upsample={self.upsample!r}", where="slab", fits=f"one of {', '.join(UPSAMPLE)}")
        if self.kv_grid is not None:
            object.__setattr__(self, "kv_grid", tuple(self.kv_grid))

    def fits(self, site: Site) -> str | None:
        if site.causal:
            return f"slab is noncausal, this site is {site.pattern}"
        reason = off_grid(site, "slab")
        if reason or site.grid is None:
            return reason
        (h, w), prefix = self._keys(site), site.grid.prefix
        if site.keys.isdigit() and prefix + h * w != int(site.keys):
            return f"slab: {site.keys} keys are not a grid of {h} x {w} with {prefix} before it: give kv_grid"
        return None

    def _keys(self, site: Any) -> tuple[int, int]:
        return self.kv_grid or (site.grid.h, site.grid.w)

    def params(self, site: Site) -> Mapping[str, Param]:
        (h, w), prefix = self._keys(site), 0 if site.grid is None else site.grid.prefix
        own = {"pos_k": Param((1, prefix + h * w, site.heads * site.dim)), "dwc_bias": Param((site.v_dim,))}
        return own | {"dwc_weight": Param((site.v_dim, 1, self.dwc_kernel, self.dwc_kernel))}

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        narrow, v = q.dtype, widened(repeat_heads(v, q))
        place = widened(p.pos_k).unflatten(2, (site.heads, -1)).transpose(1, 2)  # (1, H, M, D)
        k = widened(repeat_heads(k, q)) + place
        o: Tensor = scan(widened(q), k, v, causal=False, feature=torch.relu, normaliser="sum", eps=self.eps)
        return as_type(o + self._convolved(site, p, v), narrow)

    def _convolved(self, site: Any, p: Any, v: Tensor) -> Tensor:
        """Each head of each sample is a picture of D channels."""
        size, keys = (site.grid.h, site.grid.w), self._keys(site)
        rows = v[:, :, site.grid.prefix :].flatten(0, 1).mT  # (B * H, D, M)
        if keys != size and self.upsample == "linear1d":
            rows = interpolate(rows, size[0] * size[1], mode="linear")
        elif keys != size:
            rows = interpolate(rows.unflatten(2, keys), size, mode="bilinear").flatten(2)
        weight, bias = widened(p.dwc_weight), widened(p.dwc_bias)
        image = conv2d(rows.unflatten(2, size), weight, bias, padding=self.dwc_kernel // 2, groups=rows.shape[1])
        return pad(image.flatten(2).mT.unflatten(0, v.shape[:2]), (0, 0, site.grid.prefix, 0))

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(12)
        q = q.abs()  # a query without a positive channel would weigh nothing
        one = k[:, :, :1].abs().expand_as(k)

        def slab(q: Tensor, k: Tensor, which: Slab, **own: Tensor) -> Tensor:
            return attention(q, k, v, which, grid=(3, 4), params=own)

        yield Limit("equal keys give the mean", lambda: slab(q, one, Slab(eps=0.0)),
                    lambda: v.mean(2, keepdim=True).expand_as(v))  # fmt: skip
        yield Limit("longer queries weigh the same", lambda: slab(3 * q, k, Slab(eps=0.0)),
                    lambda: slab(q, k, Slab(eps=0.0)))  # fmt: skip
        centre = torch.zeros(8, 1, 5, 5)
        centre[:, :, 2, 2] = 1.0
        yield Limit("one tap in the middle adds v",
                    lambda: slab(q, k, Slab(), dwc_weight=centre),
                    lambda: slab(q, k, Slab()) + v)  # fmt: skip
        yield Limit("without a place for keys it is linear attention over relu",
                    lambda: slab(q, k, Slab(eps=1e-3)),
                    lambda: attention(q, k, v, "linear", feature_map="relu", eps=1e-3))  # fmt: skip
