"""Gaussian mixture masks: scores times a learned mixture of Gaussians of the tokens' distance (arXiv 2309.05375)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...compiler.functional import attention
from ...compiler.live import LiveSite
from ...compiler.mechanism import Limit, Mechanism, Param, register
from ...compiler.on_grid import off_grid
from ...compiler.primitives.attend import attend
from ...compiler.primitives.rows import widened
from ...compiler.primitives.tables import Tables
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.site import Site
from ...compiler.starts import constant
from ...compiler.symbols import name, table


@register("retnet_gmm")
@dataclass(frozen=True)
class RetNetGMM(Mechanism):
    """o = softmax_j(m_hij scale q_i . k_j) v_j, m_hij = sum_r alpha_rh exp(-d2_ij / (2 (sigma_rh^2 + eps))).

    d2 is the squared distance of two tokens, on the grid (without prefix tokens) or, without a grid, in the sequence.
    Far tokens get the score 0, not -inf: they keep a weight. A bias of the site is added after the product, as in Swin.

    >>> q, k, v = problem(4)
    >>> o = attention(q, k, v, "retnet_gmm", num_kernels=1, params={"alpha": torch.zeros(1, 4)})
    >>> bool((o - v.mean(2, keepdim=True)).abs().max() < 1e-6)  # no score is left
    True

    alpha starts at 1 / num_kernels and sigma at 1000, which is softmax attention (from scratch the paper draws sigma
    from 10 + 10 N(0, 1), alpha from 2 N(0, 1)). compat_underflow: the paper's code stores sqrt(exp(-d2)) in float32,
    which is 0 from a distance of about 10.2 on whatever sigma is.
    """

    num_kernels: int = 3
    eps: float = 1e-5
    compat_underflow: bool = False

    part = "core"
    kind = "approximate"
    honours = {"padding", "bias", "mask", "window", "dropout"}
    paper = "arXiv 2309.05375"
    tries = ({}, {"num_kernels": 1, "compat_underflow": True})

    def __post_init__(self) -> None:
        if self.num_kernels < 1:
            raise Refused(f"num_kernels={self.num_kernels}", where="retnet_gmm", fits="a number from 1 on")

    def fits(self, site: Site) -> str | None:
        if not site.self_attention:
            return f"retnet_gmm measures how far two tokens are apart, this site is {site.pattern}"
        if site.grid is None:
            return None
        return off_grid(site, "retnet_gmm", prefix=False)

    def params(self, site: Site) -> Mapping[str, Param]:
        shape = (self.num_kernels, site.heads)
        return {"sigma": Param(shape, constant(1e3)), "alpha": Param(shape, constant(1.0 / self.num_kernels))}

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tables = Tables(site.tables)
        i, j, h = name("i"), name("j"), name("h")
        if site.grid is None:
            lag = torch.arange(k.shape[2], device=k.device)
            m = table(self._mixture(p, lag * lag))[h, abs(i - j)]
        else:
            wide = site.grid.w
            y, x = (torch.arange(size, device=k.device) for size in (site.grid.h, wide))
            far = table(self._mixture(p, (y * y)[:, None] + x * x))  # (H, h, w): by |dy| and |dx|
            m = far[h, abs(i // wide - j // wide), abs(i % wide - j % wide)]
        score = site.spec.score_expr.replace({"s": name("s") * tables.settle(m)})  # inside of what the site adds
        spec = replace(site.spec, score=score.text, empty="")
        return attend(q, k, v, site=LiveSite(site.facts, spec, tuple(tables.tensors), site.ports))

    def _mixture(self, p: Any, d2: Tensor) -> Tensor:
        """m for squared distances of any shape: (H, ...)."""
        alpha, sigma = widened(p.alpha), widened(p.sigma)
        one = (1,) * d2.ndim
        narrow = 1.0 / (sigma.square() + self.eps)  # (R, H)
        if self.compat_underflow:
            base = torch.exp(-d2.float()).sqrt().to(sigma.dtype)
            gauss = base ** narrow.unflatten(1, (-1, *one))
        else:
            gauss = torch.exp(-0.5 * d2 * narrow.unflatten(1, (-1, *one)))
        return (alpha.unflatten(1, (-1, *one)) * gauss).sum(0)

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(12)
        softmax = lambda: attention(q, k, v, "softmax")

        def mixed(alpha: float, sigma: float, q: Tensor = q, **how: Any) -> Tensor:
            own = {"alpha": torch.full((1, 4), alpha), "sigma": torch.full((1, 4), sigma)}
            return attention(q, k, v, RetNetGMM(1), params=own, **how)

        yield Limit("wide kernels that sum to 1 are softmax", lambda: mixed(1.0, 1e5, grid=(3, 4)), softmax)
        yield Limit("on a sequence too", lambda: mixed(1.0, 1e5), softmax)
        yield Limit("without kernels all tokens weigh the same", lambda: mixed(0.0, 1.0, grid=(3, 4)),
                    lambda: v.mean(2, keepdim=True).expand_as(v))  # fmt: skip
        yield Limit("a narrow kernel leaves a token's score with itself", lambda: mixed(1.0, 0.0, grid=(3, 4)),
                    lambda: torch.softmax(torch.eye(12) * (q @ k.mT) * 8**-0.5, -1) @ v)  # fmt: skip
        yield Limit("alpha and q may change their signs together", lambda: mixed(-2.0, 1.5, -q, grid=(3, 4)),
                    lambda: mixed(2.0, 1.5, grid=(3, 4)))  # fmt: skip
