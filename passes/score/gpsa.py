"""Softmax attention gated against a positional one that starts as a convolution (ConViT's GPSA, arXiv 2103.10697)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import threshold

from ...compiler.functional import attention
from ...compiler.mechanism import Limit, Mechanism, Param, register
from ...compiler.on_grid import off_grid
from ...compiler.primitives.attend import attend
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.site import Site
from ...compiler.starts import constant

_LEAST = torch.finfo(torch.float32).tiny ** 0.75  # of a positional weight


@register("gpsa")
@dataclass(frozen=True)
class Gpsa(Mechanism):
    """o = (1 - g) softmax(scale * q_i . k_j) v + g R v, g = sigmoid(gating_param[h]),
    R_ij = softmax_j(w . (dx, dy, dx^2 + dy^2) + b), (dx, dy) the steps from token i to token j on the grid (h, w).

    w is pos_proj_weight (H, 3), b pos_proj_bias (H,), which cancels. R does not depend on the image, and separates:
    R v = Ry v Rx^T, two small products and no N x N matrix; a row of both weights together sums to 1.

    >>> q, k, v = problem(6)
    >>> p = {"gating_param": torch.full((4,), 50.0), "pos_proj_weight": torch.zeros(4, 3)}
    >>> o = attention(q, k, v, "gpsa", grid=(2, 3), params=p)
    >>> bool((o - v.mean(2, keepdim=True)).abs().max() < 1e-6)  # all gate, and no place preferred
    True

    use_local_init: the heads below kz * kz, kz = floor(sqrt(H)), start as the taps of a kz x kz convolution, as sharp
    as locality_strength says; the others, and all without it, start near the mean. gating_init: -10 is softmax
    attention to 5e-5; the paper trains from scratch at 1. The paper also starts W_v as the identity, which is left to
    whoever builds the model. Prefix tokens (which ConViT has behind these layers only): their rows are softmax
    attention, and R does not see them. qk_scale: the site's where left out.
    """

    locality_strength: float = 1.0
    use_local_init: bool = True
    gating_init: float = -10.0
    qk_scale: float | None = None

    part = "core"
    kind = "needs recovery"
    paper = "arXiv 2103.10697"
    tries = ({}, {"use_local_init": False, "qk_scale": 0.5})

    def __post_init__(self) -> None:
        if self.locality_strength <= 0:
            raise Refused(f"locality_strength={self.locality_strength}", where="gpsa", fits="a number above 0")

    def fits(self, site: Site) -> str | None:
        if site.causal or not site.self_attention:
            return f"gpsa is noncausal self-attention, this site is {site.pattern}"
        return off_grid(site, "gpsa")

    def params(self, site: Site) -> Mapping[str, Param]:
        return {
            "pos_proj_weight": Param((site.heads, 3), self._taps),
            "pos_proj_bias": Param((site.heads,)),
            "gating_param": Param((site.heads,), constant(self.gating_init)),
        }

    def _taps(self, weight: Tensor) -> None:
        """Head h1 + kz * h2 looks (h1 - c) steps down and (h2 - c) steps right of its token."""
        torch.nn.init.trunc_normal_(weight, std=0.02)
        if self.use_local_init:
            kz = math.isqrt(weight.shape[0])
            centre = (kz - 1) / 2 if kz % 2 == 0 else kz // 2
            for head in range(kz * kz):
                h2, h1 = divmod(head, kz)
                weight[head] = torch.tensor([2 * (h2 - centre), 2 * (h1 - centre), -1.0])
            weight *= self.locality_strength

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        content = attend(q if self.qk_scale is None else q * (self.qk_scale / site.scale), k, v, site=site)
        wide = torch.promote_types(v.dtype, torch.float32)
        prefix, h, w = site.grid.prefix, site.grid.h, site.grid.w
        w_x, w_y, w_d = p.pos_proj_weight.to(wide).unbind(1)
        Ry = _near(w_y, w_d, 0 * w_d, h)  # (H, h, h)
        Rx = _near(w_x, w_d, p.pos_proj_bias.to(wide), w)
        image = v.to(wide).repeat_interleave(q.shape[1] // v.shape[1], 1)[:, :, prefix:].unflatten(2, (h, w))
        placed = torch.einsum("nab,mnbcd->mnacd", Ry, torch.einsum("nab,mncbd->mncad", Rx, image)).flatten(2, 3)
        g = torch.sigmoid(p.gating_param.to(wide))[:, None, None]
        mixed = ((1 - g) * content[:, :, prefix:].to(wide) + g * placed).to(content.dtype)
        return torch.cat((content[:, :, :prefix], mixed), 2) if prefix else mixed

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(12, heads=9)

        def gated(gate: float, queries: Tensor = q, strength: float = 1.0) -> Tensor:
            p = {"gating_param": torch.full((9,), gate)}
            return attention(queries, k, v, Gpsa(strength), grid=(3, 4), params=p)

        yield Limit("a shut gate is softmax", lambda: gated(-30.0), lambda: attention(q, k, v, "softmax"))
        yield Limit("behind an open gate q does not count", lambda: gated(30.0), lambda: gated(30.0, -q))
        yield Limit("sharp taps are a convolution's: head 0 looks one up, one left",
                    lambda: gated(30.0, strength=60.0).unflatten(2, (3, 4))[:, 0, 1:, 1:],
                    lambda: v.unflatten(2, (3, 4))[:, 0, :-1, :-1])  # fmt: skip


def _near(slope: Tensor, curve: Tensor, level: Tensor, size: int) -> Tensor:
    """softmax over b of slope (b - a) + curve (b - a)^2 + level, per head: (H, size, size); nothing where it is so
    small that products with it are no whole floats, which processors multiply many times as slowly.
    """
    place = torch.arange(size, device=slope.device, dtype=slope.dtype)
    step = place - place[:, None]
    logits = slope[:, None, None] * step + curve[:, None, None] * step**2 + level[:, None, None]
    return threshold(torch.softmax(logits, -1), _LEAST, 0.0)
