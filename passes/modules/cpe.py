"""A positional encoding by convolution: a token plus a depthwise convolution around it (L2ViT, arXiv 2501.16182)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu

from ...compiler.layers import module
from ...compiler.mechanism import Limit, Mechanism, Param, register
from ...compiler.on_grid import off_grid
from ...compiler.primitives.rows import as_type, widened
from ...compiler.problem import hidden
from ...compiler.refusal import Refused
from ...compiler.site import Site


@register("cpe")
@dataclass(frozen=True)
class CPE(Mechanism):
    """y = x + conv(x), or x + gelu(conv(x)) with act; conv depthwise on the grid, zeros beyond the edge.

    It stands before each sub-block of L2ViT and DaViT; `insert: cpe` puts it before attention. It starts as identity.

    >>> layer, x = module("cpe", dim=8, grid=(3, 4)), torch.randn(2, 12, 8)
    >>> bool((layer(x) == x).all())
    True
    """

    kernel: int = 3
    act: bool = False

    part = "insert"
    stands = "before"
    kind = "needs recovery"
    paper = "arXiv 2501.16182"
    tries = ({}, {"act": True, "kernel": 5})

    def __post_init__(self) -> None:
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise Refused(f"kernel={self.kernel}", where="cpe", fits="an odd number")

    def fits(self, site: Site) -> str | None:
        return off_grid(site, "cpe", prefix=False)

    def params(self, site: Site) -> Mapping[str, Param]:
        wide = site.width
        return {"conv_weight": Param((wide, 1, self.kernel, self.kernel)), "conv_bias": Param((wide,))}

    def forward(self, site: Any, p: Any, x: Tensor) -> Tensor:
        image = widened(x).mT.unflatten(2, (site.grid.h, site.grid.w))
        weight, bias = widened(p.conv_weight), widened(p.conv_bias)
        near = conv2d(image, weight, bias, padding=self.kernel // 2, groups=image.shape[1]).flatten(2).mT
        return as_type(widened(x) + (gelu(near) if self.act else near), x.dtype)

    def limits(self) -> Iterable[Limit]:
        x = hidden(12, width=8)

        def centre() -> Tensor:
            layer = module("cpe", dim=8, grid=(3, 4))
            with torch.no_grad():
                layer.reattend.get_parameter("conv_weight")[:, :, 1, 1] = 1.0
            return layer(x).detach()

        yield Limit("a tap in the middle adds the token", centre, lambda: 2 * x)
        yield Limit("it starts as nothing", lambda: module("cpe", dim=8, grid=(3, 4))(x), lambda: x)
