"""Blocked local attention: blocks of queries see their block and a halo around it (HaloNet, arXiv 2103.12731)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ...compiler.functional import attention
from ...compiler.mechanism import Limit, Mechanism, Param, register
from ...compiler.primitives.attend import Relative
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.site import Site
from .grid_windows import Cut, attend_windows, no_grid

LEAST = torch.finfo(torch.float32).tiny


@register("halo")
@dataclass(frozen=True)
class Halo(Mechanism):
    """o = softmax(scale q kᵀ + P) v over the (block + 2 halo)² keys of a block's window, win = block + 2 halo wide.

    P = q · rel_h[ky - y + win - 1] + q · rel_w[kx - x + win - 1], y counted in the block and ky in the window, so that
    the table's centre is not zero displacement; scale_pos_bias multiplies P by the scale too. pad_mode mask: places
    outside the picture are no keys; zero: they are keys and values of 0 with the logit P (the runnable reference).
    query_stride 2 answers every second query of a block, y then counted among those, or where the block is odd means of
    2 x 2 answers: the output has a quarter of the rows.
    Blocks that do not tile the grid: the rest is masked, and with pad_mode zero padded.

    >>> q, k, v = problem(16)
    >>> o = attention(q, k, v, "halo", grid=(4, 4), block=2, halo=0, rel_pos=False)
    >>> block = attention(q[:, :, [0, 1, 4, 5]], k[:, :, [0, 1, 4, 5]], v[:, :, [0, 1, 4, 5]], "softmax")
    >>> bool((o[:, :, [0, 1, 4, 5]] - block).abs().max() < 1e-6)
    True

    The tables start at 0 (from scratch: normal with deviation D ** -0.5), and pad_mode is mask unless asked for:
    closest to softmax attention, and a picture's border does not pull towards 0.
    """

    block: int = 8
    halo: int = 3
    rel_pos: bool = True
    scale_pos_bias: bool = False
    pad_mode: Literal["mask", "zero"] = "mask"
    query_stride: int = 1
    scale: float | None = None

    part = "core"
    kind = "approximate"
    honours = {"padding"}
    paper = "arXiv 2103.12731"
    tries = ({"block": 2, "halo": 1}, {"block": 2, "halo": 2, "pad_mode": "zero", "scale_pos_bias": True},
             {"block": 3, "halo": 0, "rel_pos": False})  # fmt: skip

    def __post_init__(self) -> None:
        if self.query_stride not in (1, 2):
            raise Refused(f"query_stride={self.query_stride}", where="halo", fits="1 or 2")
        if self.block < 1 or self.halo < 0 or self.pad_mode not in ("mask", "zero"):
            found = f"block={self.block}, halo={self.halo}, pad_mode={self.pad_mode!r}"
            raise Refused(found, where="halo", fits="block >= 1, halo >= 0, pad_mode mask or zero")
        if self.scale is not None and abs(self.scale) < LEAST and not self.scale_pos_bias:
            fits = f"at least {LEAST:.2g} from 0: relative terms are divided by it"
            raise Refused(f"scale={self.scale}", where="halo", fits=fits)

    def fits(self, site: Site) -> str | None:
        ragged = site.grid is not None and (site.grid.h % self.block or site.grid.w % self.block)
        if self.query_stride > 1 and ragged:
            return f"query_stride={self.query_stride} on a grid that blocks of {self.block} do not tile"
        return no_grid(site, "halo")

    @property
    def window(self) -> int:
        return self.block + 2 * self.halo

    def params(self, site: Site) -> Mapping[str, Param]:
        rows = 2 * self.window - 1
        return {name: Param((rows, site.dim)) for name in ("rel_h", "rel_w")} if self.rel_pos else {}

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None = None) -> Tensor:
        scale = site.scale if self.scale is None else self.scale
        inside = self.query_stride if self.block % self.query_stride == 0 else 1
        o = attend_windows(
            q, k, v, Cut(site.grid, self.block, self.block), scale=scale, halo=self.halo, beyond=self.pad_mode,
            relative=self._relative(p, scale, self.block // inside) if self.rel_pos else (), stride=inside,
            key_padding=key_padding,
        )  # fmt: skip
        return o if inside == self.query_stride else self._pooled(site, o)

    def _pooled(self, site: Any, o: Tensor) -> Tensor:
        """Means of 2 x 2 tokens of the answer."""
        prefix = site.grid.prefix
        image = o[:, :, prefix:].mT.flatten(0, 1).unflatten(2, (site.grid.h, site.grid.w))
        pooled = avg_pool2d(image, self.query_stride).flatten(2).unflatten(0, o.shape[:2]).mT
        return torch.cat((o[:, :, :prefix], pooled), 2)

    def _relative(self, p: Any, scale: float, b: int) -> tuple[Relative, Relative]:
        """Both tables; `attend` multiplies what they add by the scale."""
        win = self.window
        factor = 1.0 if self.scale_pos_bias else 1.0 / scale
        return (
            Relative(p.rel_h[None] * factor, lambda i, j: j // win - i // b + win - 1),
            Relative(p.rel_w[None] * factor, lambda i, j: j % win - i % b + win - 1),
        )

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(12)
        yield Limit("a halo over the whole picture is full attention",
                    lambda: attention(q, k, v, Halo(2, 3, rel_pos=False), grid=(3, 4)),
                    lambda: attention(q, k, v, "softmax"))  # fmt: skip
        flat = v[:, :, :1].expand_as(v)
        yield Limit("a constant v comes out", lambda: attention(q, k, flat, Halo(2, 1), grid=(3, 4)), lambda: flat)
        yield Limit("a table that is the same everywhere changes nothing",
                    lambda: attention(q, k, v, Halo(2, 1), grid=(3, 4), params={"rel_w": torch.ones(8)}),
                    lambda: attention(q, k, v, Halo(2, 1, rel_pos=False), grid=(3, 4)))  # fmt: skip
