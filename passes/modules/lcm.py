"""L2ViT's local concentration module: two depthwise convolutions around a BatchNorm (arXiv 2501.16182)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu

from ...compiler.layers import module
from ...compiler.mechanism import Aux, Limit, Mechanism, Param, register
from ...compiler.on_grid import off_grid
from ...compiler.primitives.rows import as_type, widened
from ...compiler.problem import hidden
from ...compiler.refusal import Refused
from ...compiler.site import Site
from ...compiler.starts import constant, uniform


@register("lcm")
@dataclass(frozen=True)
class LCM(Mechanism):
    """y = conv2(BN(gelu(conv1(x)))) on the grid, both convolutions depthwise, kernel x kernel, zeros beyond the edge.

    It stands behind the attention of a linear block, x + lcm(LN(x)), where `insert: lcm` puts it, with a LayerNorm of
    its own. conv2 starts at 0: inserted so it changes nothing.
    BN has the statistics of a channel over samples and places in train(), where the running ones follow by `momentum`
    with the unbiased variance, and the running ones in eval().

    >>> layer, x = module("lcm", dim=8, grid=(3, 4)).eval(), torch.randn(2, 12, 8)
    >>> bool((layer(x) == 0).all())
    True
    """

    kernel: int = 7
    bn_eps: float = 1e-5
    momentum: float = 0.1

    part = "insert"
    stands = "behind"
    kind = "needs recovery"
    paper = "arXiv 2501.16182"
    tries = ({}, {"kernel": 3})

    def __post_init__(self) -> None:
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise Refused(f"kernel={self.kernel}", where="lcm", fits="an odd number")

    def fits(self, site: Site) -> str | None:
        return off_grid(site, "lcm", prefix=False)

    def params(self, site: Site) -> Mapping[str, Param]:
        wide, taps = (site.width,), (site.width, 1, self.kernel, self.kernel)
        start = uniform(self.kernel**2)
        own = {"conv1_weight": Param(taps, start), "conv1_bias": Param(wide, start)}
        own |= {"conv2_weight": Param(taps), "conv2_bias": Param(wide)}
        return own | {"bn_weight": Param(wide, constant(1.0)), "bn_bias": Param(wide)}

    def buffers(self, site: Site) -> Mapping[str, Param]:
        wide = (site.width,)
        return {"bn_mean": Param(wide, dtype=torch.float32), "bn_var": Param(wide, constant(1.0), torch.float32)}

    def forward(self, site: Any, p: Any, x: Tensor, train: Tensor | None = None) -> Any:
        image = widened(x).mT.unflatten(2, (site.grid.h, site.grid.w))
        inner = gelu(self._convolved(image, p.conv1_weight, p.conv1_bias))
        mean, var, after = widened(p.bn_mean), widened(p.bn_var), {}
        if train is not None:
            mean, var = inner.mean((0, 2, 3)), inner.var((0, 2, 3), correction=0)
            count = inner[:, 0].numel()
            seen = {"bn_mean": mean, "bn_var": var * (count / max(count - 1, 1))}
            after = {name: getattr(p, name).lerp(new.detach().float(), self.momentum) for name, new in seen.items()}
        slope = widened(p.bn_weight) * (var + self.bn_eps).rsqrt()
        normed = (inner - mean[:, None, None]) * slope[:, None, None] + widened(p.bn_bias)[:, None, None]
        y = self._convolved(normed, p.conv2_weight, p.conv2_bias).flatten(2).mT
        return as_type(y, x.dtype), Aux(buffers=after)

    def _convolved(self, image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weight, bias = widened(weight), widened(bias)
        return conv2d(image, weight, bias, padding=self.kernel // 2, groups=image.shape[1])

    def limits(self) -> Iterable[Limit]:
        x = hidden(12, width=8)

        def taps() -> Tensor:
            layer = module("lcm", dim=8, grid=(3, 4)).eval()
            with torch.no_grad():
                for name in ("conv1", "conv2"):
                    layer.reattend.get_parameter(f"{name}_weight").zero_()[:, :, 3, 3] = 1.0
                    layer.reattend.get_parameter(f"{name}_bias").zero_()
            return layer(x).detach()

        yield Limit("taps in the middle leave the chain of every number", taps, lambda: gelu(x) * (1 + 1e-5) ** -0.5)
        yield Limit("it starts as nothing", lambda: module("lcm", dim=8, grid=(3, 4))(x), lambda: torch.zeros_like(x))
