"""InLine attention: linear attention whose weights sum to 1 by subtraction, with a local part (arXiv 2412.06590)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, leaky_relu, pad

from ...compiler.functional import attention
from ...compiler.mechanism import Limit, Mechanism, Param, register
from ...compiler.on_grid import off_grid
from ...compiler.primitives.rows import as_type, repeat_heads, widened
from ...compiler.primitives.scan import scan
from ...compiler.problem import hidden, problem
from ...compiler.refusal import Refused
from ...compiler.site import Site
from ...compiler.starts import uniform

MAPS: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda x, t: x,
    "relu": lambda x, t: torch.relu(x),
    "leakyrelu": lambda x, t: leaky_relu(x, 0.01),
    "exp": lambda x, t: torch.exp(t * x),
}


@register("inline")
@dataclass(frozen=True)
class InLine(Mechanism):
    """o_i = sum_j w_ij v_j + local_i, w_ij = s_ij - mean_j s_ij + 1/M, s_ij = scale phi(q_i) . phi(k_j) / M.

    >>> q, k, v = problem(5)
    >>> s = q @ k.mT * 8**-0.5 / 5
    >>> o = attention(q, k, v, "inline", local_kernel=0)
    >>> torch.allclose(o, (s - s.mean(-1, keepdim=True) + 1 / 5) @ v, atol=1e-6)
    True

    Nothing is divided by the data, weights may be negative, and other queries give other weights (injective). To first
    order in the scores it is softmax.

    local_kernel  size of a depthwise convolution of v on the grid, zeros beyond the edge, whose kernels (B, C, 3, 3) a
                  grouped two-layer network (res_w1, res_b1, res_w2, res_b2) makes of the mean of x; prefix tokens take
                  no part. Needs x (or port x_mean, (B, C)) of width H * Dv. 0: no local part. The last layer starts
                  at 0, so that the local part does.
    phi           identity, relu, leakyrelu (0.01), or exp: exp(phi_t x).
    scale         the site's own where left out. prefix_tokens: the grid's where left out.
    """

    phi: str = "identity"
    phi_t: float = 0.2
    scale: float | None = None
    local_kernel: int = 3
    prefix_tokens: int | None = None

    part = "core"
    kind = "needs recovery"
    honours = frozenset[str]()
    least = {"prefix_tokens": 0}
    paper = "arXiv 2412.06590"
    heads_alike = False  # a head's kernels are made of its own part of x
    tries = ({"local_kernel": 0}, {"phi": "exp"}, {"phi": "leakyrelu", "scale": 0.5, "local_kernel": 5})

    def __post_init__(self) -> None:
        if self.phi not in MAPS:
            raise Refused(f"phi={self.phi!r}", where="inline", fits=f"one of {', '.join(MAPS)}")
        if self.local_kernel < 0 or (self.local_kernel and self.local_kernel % 2 == 0):
            raise Refused(f"local_kernel={self.local_kernel}", where="inline", fits="0, or an odd number")

    def fits(self, site: Site) -> str | None:
        if site.causal:
            return f"inline is noncausal, this site is {site.pattern}"
        if not self.local_kernel:
            return None
        if not site.self_attention:
            return "inline's local part convolves the tokens' own values, this site is cross-attention: local_kernel=0"
        if "x" not in site.ports and "x_mean" not in site.ports:
            return "inline's local part asks for port x or x_mean, which this site does not have: local_kernel=0"
        if site.width and site.width != site.heads * site.v_dim:
            found = f"{site.width} channels of x for {site.heads} heads of {site.v_dim}"
            return f"inline: {found}; its kernels are one per channel of v: local_kernel=0"
        if self.prefix_tokens is not None and site.grid is not None:
            return None
        reason = off_grid(site, "inline's local part")
        return reason and f"{reason}; local_kernel=0 goes without"

    def wanted_ports(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return ("q", "k", "v"), ("x", "x_mean") if self.local_kernel else ()

    def params(self, site: Site) -> Mapping[str, Param]:
        if not self.local_kernel:
            return {}
        width, per_head, taps = site.heads * site.v_dim, site.v_dim, self.local_kernel**2
        start = uniform(per_head)
        own = {"res_w1": Param((width, per_head), start), "res_b1": Param((width,), start)}
        return own | {"res_w2": Param((taps * width, per_head)), "res_b2": Param((taps * width,))}

    def forward(
        self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor | None = None, x_mean: Tensor | None = None
    ) -> Tensor:
        narrow, v = q.dtype, widened(repeat_heads(v, q))
        q, k = MAPS[self.phi](widened(q), self.phi_t), MAPS[self.phi](widened(repeat_heads(k, q)), self.phi_t)
        scale = site.scale if self.scale is None else self.scale
        keys = torch.ones_like(k[..., :1]).sum(2, keepdim=True)
        mean_k, mean_v = k.mean(2, keepdim=True), v.mean(2, keepdim=True)
        o: Tensor = scan(q, k, v * (scale / keys), causal=False)
        o = o + (1.0 - scale * (q * mean_k).sum(-1, keepdim=True)) * mean_v
        if self.local_kernel:
            mean = x_mean if x_mean is not None else widened(x).mean(1)  # type: ignore[arg-type]
            o = o + self._local(site, self._kernels(site, p, widened(mean)), v)
        return as_type(o, narrow)

    def _kernels(self, site: Any, p: Any, mean: Tensor) -> Tensor:
        """(B, H, D, taps), each head's of its own part of the mean."""
        heads, size = site.heads, site.v_dim
        w1, w2 = widened(p.res_w1).view(heads, size, size), widened(p.res_w2).view(heads, -1, size)
        inner = gelu(
            torch.einsum("bhi,hoi->bho", mean.unflatten(1, (heads, size)), w1) + widened(p.res_b1).view(heads, -1)
        )
        r = torch.einsum("bhi,hoi->bho", inner, w2) + widened(p.res_b2).view(heads, -1)
        return r.unflatten(2, (size, -1))

    def _local(self, site: Any, r: Tensor, v: Tensor) -> Tensor:
        """A depthwise convolution with kernels of its own for every sample: as many shifted products as it has taps."""
        prefix = site.grid.prefix if self.prefix_tokens is None else self.prefix_tokens
        h, w, half = site.grid.h, site.grid.w, self.local_kernel // 2
        image = pad(v[:, :, prefix:].unflatten(2, (h, w)), (0, 0, half, half, half, half))  # (B, H, h, w, D)
        found = torch.zeros_like(v[:, :, prefix:]).unflatten(2, (h, w))
        for tap in range(self.local_kernel**2):
            y, x = divmod(tap, self.local_kernel)
            found = found + image[:, :, y : y + h, x : x + w] * r[:, :, None, None, :, tap]
        return pad(found.flatten(2, 3), (0, 0, prefix, 0))

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(12)
        bare, flat = InLine(local_kernel=0), v[:, :, :1].expand_as(v)
        yield Limit("weights sum to 1", lambda: attention(q, k, flat, bare), lambda: flat)
        yield Limit("a query of 0 gives the mean", lambda: attention(0 * q, k, v, bare),
                    lambda: v.mean(2, keepdim=True).expand_as(v))  # fmt: skip
        yield Limit("the same shift of all keys changes nothing", lambda: attention(q, k + q[:, :, :1], v, bare),
                    lambda: attention(q, k, v, bare))  # fmt: skip
        yield Limit("small scores are softmax", lambda: attention(0.002 * q, k, v, bare),
                    lambda: attention(0.002 * q, k, v, "softmax"))  # fmt: skip
        centre = torch.zeros(32, 9)
        centre[:, 4] = 1.0
        yield Limit("one tap in the middle adds v",
                    lambda: attention(q, k, v, InLine(), grid=(3, 4), ports={"x": hidden(12)},
                                      params={"res_b2": centre.flatten()}),
                    lambda: attention(q, k, v, bare) + v)  # fmt: skip
