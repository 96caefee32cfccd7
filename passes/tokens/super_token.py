"""Super tokens: attention among soft means of neighbouring tokens, spread back over them (STViT, arXiv 2211.11167)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...compiler.functional import attention
from ...compiler.mechanism import Limit, Mechanism, register
from ...compiler.on_grid import off_grid
from ...compiler.primitives.attend import attend
from ...compiler.primitives.group import group
from ...compiler.primitives.rows import as_type, repeat_heads, widened
from ...compiler.problem import hidden, problem
from ...compiler.refusal import Refused
from ...compiler.site import Site
from ..sparse.grid_windows import Cut


@register("super_token")
@dataclass(frozen=True)
class SuperToken(Mechanism):
    """A_pn = softmax_n(affinity_scale x_p . S_n), n the 3 x 3 super tokens around p's cell; o_p = sum_n A_pn Y_n,
    Y = softmax(scale Q Kᵀ) V over super tokens, Q_n = sum_p A_pn q_p / (sum_p A_pn + eps), K and V alike.

    S_n starts as the mean of a cell of tokens, and is n_iter - 1 times replaced by sum_p A_pn x_p / (sum_p A_pn + eps).
    Cells of one token are softmax attention.

    >>> q, k, v = problem(12)
    >>> one = {"cell": (3, 4), "mask_border": True}  # a single super token: the mean of all
    >>> o = attention(q, k, v, "super_token", grid=(3, 4), ports={"x": hidden(12)}, **one)
    >>> torch.allclose(o, v.mean(2, keepdim=True).expand_as(o), atol=1e-6)
    True

    Neighbours beyond the edge are vectors of 0 and take their share of A, so that outputs near it are smaller, unless
    mask_border. Where cells reach over the edge of the picture, the tokens there are 0 and count: Q is then that of the
    paper's code, which projects S, up to what a bias of the projection adds.
    The paper learns nothing through A: affinity_grad=True lets it. Its output projection stands before the spreading,
    here behind it, which is the same but for its bias at the border. Prefix tokens are super tokens of their own.
    """

    cell: tuple[int, int] = (8, 8)
    n_iter: int = 1
    affinity_scale: float | None = None
    eps: float = 1e-12
    mask_border: bool = False
    affinity_grad: bool = False

    part = "core"
    kind = "needs recovery"
    paper = "arXiv 2211.11167"
    tries = (
        {"cell": (2, 2), "affinity_grad": True},
        {"cell": (2, 3), "n_iter": 2, "mask_border": True, "affinity_grad": True},
        {"cell": (1, 1)},
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "cell", (self.cell,) * 2 if isinstance(self.cell, int) else tuple(self.cell))
        if min(self.cell) < 1 or self.n_iter < 1:
            found = f"cell={self.cell}, n_iter={self.n_iter}"
            raise Refused(found, where="super_token", fits="a cell of 1 x 1 or more, n_iter of 1 or more")

    def fits(self, site: Site) -> str | None:
        if not site.self_attention or site.causal:
            return f"super_token is noncausal self-attention on a picture, this site is {site.pattern}"
        return off_grid(site, "super_token")

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        if self.cell == (1, 1):
            return attend(q, k, v, scale=site.scale)
        cut, prefix, narrow = Cut(site.grid, *self.cell), site.grid.prefix, v.dtype
        near = _neighbours(cut, q.device)
        shares = self._affinity(widened(x)[:, None, prefix:], cut, near)  # (B, 1, cells, tokens of one, 9)
        if not self.affinity_grad:
            shares = shares.detach()
        mass = self._gathered(shares.sum(3).unsqueeze(-1), near) + self.eps  # (B, 1, cells, 1)
        few = []
        for t in (widened(repeat_heads(t, q)) for t in (q, k, v)):
            few.append(torch.cat((t[:, :, :prefix], self._collected(t[:, :, prefix:], cut, near, shares) / mass), 2))
        y = attend(*few, scale=site.scale)  # (B, H, prefix + cells, D)
        tokens = (shares @ group(y[:, :, prefix:], near)[0]).flatten(2, 3).index_select(2, cut.back(q.device))
        return as_type(torch.cat((y[:, :, :prefix], tokens), 2), narrow)

    def _affinity(self, x: Tensor, cut: Cut, near: Tensor) -> Tensor:
        scale = x.shape[3] ** -0.5 if self.affinity_scale is None else self.affinity_scale
        tokens = group(x, cut.rows(x.device))[0]  # (B, 1, cells, tokens of one, C), 0 beyond the edge
        means = tokens.mean(3)
        for step in range(self.n_iter):
            scores = scale * tokens @ group(means, near)[0].mT
            if self.mask_border:
                scores = scores.masked_fill((near < 0)[:, None], -torch.inf)
            shares = scores.softmax(-1)
            if step < self.n_iter - 1:
                mass = self._gathered(shares.sum(3).unsqueeze(-1), near) + self.eps
                means = self._gathered(shares.mT @ tokens, near) / mass
        return shares

    def _collected(self, t: Tensor, cut: Cut, near: Tensor, shares: Tensor) -> Tensor:
        """sum_p A_pn t_p for every super token."""
        return self._gathered(shares.mT @ group(t, cut.rows(t.device))[0], near)

    def _gathered(self, parts: Tensor, near: Tensor) -> Tensor:
        """What every super token is given by the cells around it: parts (B, H, cells, 9, D), for each neighbour one."""
        givers = near.flip(1)  # the cell at offset -n gives its part n
        number = torch.where(givers < 0, -1, givers * 9 + torch.arange(9, device=near.device))
        found: Tensor = group(parts.flatten(2, 3), number, combine="sum")[0]
        return found

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(12)
        x, flat = {"x": hidden(12)}, v[:, :, :1].expand_as(v)

        def super_token(v: Tensor, **knobs: Any) -> Tensor:
            return attention(q, k, v, SuperToken(**knobs), grid=(3, 4), ports=x)

        yield Limit("cells of one token are softmax", lambda: super_token(v, cell=(1, 1)),
                    lambda: attention(q, k, v, "softmax"))  # fmt: skip
        yield Limit("one super token is the mean", lambda: super_token(v, cell=(3, 4), mask_border=True),
                    lambda: v.mean(2, keepdim=True).expand_as(v))  # fmt: skip
        yield Limit("a constant v comes out", lambda: super_token(flat, cell=(1, 2), n_iter=2, mask_border=True),
                    lambda: flat)  # fmt: skip


def _neighbours(cut: Cut, device: torch.device) -> Tensor:
    """The 3 x 3 super tokens around each, row by row, -1 beyond the edge: (cells, 9)."""
    h, w = cut.counts
    step = torch.arange(-1, 2, device=device)
    y = torch.arange(h, device=device)[:, None, None, None] + step[:, None]
    x = torch.arange(w, device=device)[None, :, None, None] + step
    inside = (y >= 0) & (y < h) & (x >= 0) & (x < w)
    return torch.where(inside, y * w + x, -1).flatten(0, 1).flatten(1)
