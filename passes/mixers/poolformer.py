"""Average pooling minus identity in the place of attention: y = mean of a window around x, - x (arXiv 2111.11418)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, avg_pool2d, pad

from ...compiler.layers import module
from ...compiler.mechanism import Limit, Mechanism, register
from ...compiler.problem import hidden
from ...compiler.refusal import Refused
from ...compiler.site import Site


@register("poolformer")
@dataclass(frozen=True)
class PoolFormer(Mechanism):
    """The mixer of PoolFormer, projections included: the mean over the real tokens of a window, minus the token itself.

    On a grid the window is pool_size x pool_size and prefix tokens get 0; on a sequence it is pool_size tokens,
    trailing where the site is causal (a causal picture is a sequence in raster order).

    >>> x = torch.arange(5.0).view(1, 5, 1)
    >>> module("poolformer")(x).flatten()
    tensor([ 0.5000,  0.0000,  0.0000,  0.0000, -0.5000])
    """

    pool_size: int = 3

    part = "region"
    kind = "needs recovery"
    honours = {"padding"}
    paper = "arXiv 2111.11418"

    def __post_init__(self) -> None:
        if self.pool_size < 1 or self.pool_size % 2 == 0:
            raise Refused(f"pool_size={self.pool_size}", where="poolformer", fits="an odd number: 1, 3, 5, ...")

    def fits(self, site: Site) -> str | None:
        return None if site.self_attention else f"poolformer pools the tokens themselves, this is {site.pattern}"

    def forward(self, site: Any, p: Any, x: Tensor, key_padding: Tensor | None = None) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        prefix = 0 if site.causal or site.grid is None else site.grid.prefix
        real = torch.ones_like(x[..., :1], dtype=wide)
        if key_padding is not None:
            real = real * key_padding[..., None].to(wide)
        tokens, real = x.to(wide)[:, prefix:], real[:, prefix:]
        count = self._pool(site, real)
        mean = self._pool(site, tokens * real) / torch.where(count > 0, count, torch.ones_like(count))
        y = (mean - tokens).to(x.dtype)
        return pad(y, (0, 0, prefix, 0)) if prefix else y

    def _pool(self, site: Any, t: Tensor) -> Tensor:
        """Sums over windows (up to a factor that numerator and count share), zeros beyond the edge."""
        size, half = self.pool_size, self.pool_size // 2
        if site.grid is not None and not site.causal:
            image = t.mT.unflatten(2, (site.grid.h, site.grid.w))  # (B, C, h, w)
            return avg_pool2d(image, size, 1, half).flatten(2).mT
        sides = (size - 1, 0) if site.causal else (half, half)
        return avg_pool1d(pad(t.mT, sides), size, 1).mT

    def limits(self) -> Iterable[Limit]:
        x = hidden(12)
        yield Limit("a constant gives 0", lambda: module(self)(torch.ones_like(x)), lambda: torch.zeros_like(x))
        yield Limit("pool_size 1 gives 0", lambda: module("poolformer", pool_size=1)(x), lambda: torch.zeros_like(x))
        yield Limit("a window over everything gives the mean minus x",
                    lambda: module("poolformer", grid=(3, 4), pool_size=7)(x),
                    lambda: x.mean(1, keepdim=True) - x)  # fmt: skip
        yield Limit(
            "one pixel gives 0", lambda: module(self, grid=(1, 1))(x[:, :1]), lambda: torch.zeros_like(x[:, :1])
        )
