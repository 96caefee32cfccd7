"""A few large windows that move from call to call, for the finest stage of a diffusion U-Net (HiDiffusion)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ...compiler.functional import attention
from ...compiler.mechanism import Aux, Limit, Mechanism, Param, register
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.site import Site
from .grid_windows import Cut, attend_windows, no_grid


@register("msw_msa")
@dataclass(frozen=True)
class MswMsa(Mechanism):
    """The grid, a torus, is cut into windows (2, 2) that are moved by shift_index quarters; each attends inside.

    shift = (win_h // 4 * shift_index, win_w // 4 * shift_index), win = ceil(side / windows). Tokens that come around
    the edge are not masked unless mask_wrapped. Sides that the windows do not divide get a last window that is smaller,
    where the reference interpolates the picture.

    >>> q, k, v = problem(16)
    >>> o = attention(q, k, v, "msw_msa", grid=(4, 4))
    >>> block = attention(q[:, :, [0, 1, 4, 5]], k[:, :, [0, 1, 4, 5]], v[:, :, [0, 1, 4, 5]], "softmax")
    >>> bool((o[:, :, [0, 1, 4, 5]] - block).abs().max() < 1e-6)
    True

    shift_policy fixed: the buffer shift_index says it, set it between the steps of a sampler; the graph stays. random:
    drawn uniformly at every site and call, in the graph. cycle: the buffer goes on by one after each call in train().
    """

    windows: tuple[int, int] = (2, 2)
    shift_index: int = 0
    shift_policy: Literal["fixed", "random", "cycle"] = "fixed"
    mask_wrapped: bool = False

    part = "core"
    kind = "approximate"
    honours = {"padding"}
    paper = "arXiv 2311.17528"
    tries = ({}, {"shift_index": 2, "mask_wrapped": True}, {"shift_policy": "random"}, {"windows": (1, 2)})

    def __post_init__(self) -> None:
        object.__setattr__(self, "windows", tuple(self.windows))
        if min(self.windows) < 1 or not 0 <= self.shift_index <= 3:
            found = f"windows={self.windows}, shift_index={self.shift_index}"
            raise Refused(found, where="msw_msa", fits="1 or more windows per axis, shift_index 0 to 3")

    def fits(self, site: Site) -> str | None:
        return no_grid(site, "msw_msa")

    def buffers(self, site: Site) -> Mapping[str, Param]:
        if self.shift_policy == "random":
            return {}
        return {"shift_index": Param((), lambda t: t.fill_(self.shift_index), torch.long)}

    def draws(self, site: Site) -> Mapping[str, Param]:
        drawn = Param((), lambda t: t.copy_(torch.randint(0, 4, (), device=t.device)), torch.long)
        return {"shift_index": drawn} if self.shift_policy == "random" else {}

    def forward(
        self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None = None
    ) -> tuple[Tensor, Aux]:
        h, w = (-(-side // count) for side, count in zip((site.grid.h, site.grid.w), self.windows, strict=True))
        cut = Cut(site.grid, h, w, (h // 4 * p.shift_index, w // 4 * p.shift_index))
        apart = cut.wrapped(q.device) if self.mask_wrapped else None
        o = attend_windows(q, k, v, cut, scale=site.scale, apart=apart, key_padding=key_padding)
        turned = {"shift_index": (p.shift_index + 1) % 4} if self.shift_policy == "cycle" else {}
        return o, Aux(buffers=turned)

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(64)
        for index in (0, 3):
            yield Limit(f"one window is full attention, moved by {index} quarters",
                        partial(attention, q, k, v, MswMsa((1, 1), index), grid=(8, 8)),
                        lambda: attention(q, k, v, "softmax"))  # fmt: skip
        a, b, c = (t.unflatten(2, (8, 8)).roll((1, 1), (2, 3)).flatten(2, 3) for t in (q, k, v))
        yield Limit("a picture moved on the torus is windows moved back",
                    lambda: attention(a, b, c, MswMsa(shift_index=2), grid=(8, 8)),
                    lambda: attention(q, k, v, MswMsa(shift_index=1), grid=(8, 8)).unflatten(2, (8, 8))
                    .roll((1, 1), (2, 3)).flatten(2, 3))  # fmt: skip
