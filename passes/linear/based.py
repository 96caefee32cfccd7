"""Based: the second-order Taylor polynomial in place of the exponential, windows beside it (arXiv 2402.18668)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from ...compiler.functional import attention
from ...compiler.mechanism import Limit, Mechanism, Param, register
from ...compiler.primitives.attend import attend
from ...compiler.primitives.rows import as_type, repeat_heads, widened
from ...compiler.primitives.scan import scan
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.site import Site
from ...compiler.starts import constant, uniform


@register("based")
@dataclass(frozen=True)
class Based(Mechanism):
    """o_n = sum_{m<=n} w_nm v_m / (sum_{m<=n} w_nm + eps), w = 1 + s + s^2 / 2 > 0 with s = q_n . k_m / sqrt(d).

    >>> q, k, v = problem(6)
    >>> s = q @ k.mT * 8**-0.5
    >>> w = (1 + s + s**2 / 2).tril()
    >>> torch.allclose(attention(q, k, v, "based", causal=True), w @ v / w.sum(-1, keepdim=True), atol=1e-5)
    True

    phi(x) = (1, x / d^(1/4), vec(x xᵀ) / sqrt(2 d)) has 1 + d + d^2 features, a state of as many rows: good for narrow
    heads. Where q and k are not feature_dim wide and x is at hand, proj_q and proj_k (H * d, C) make new ones from x,
    without positions, and need training. In a model they start at the product of rank d that is nearest to each head's
    W_q^T W_k, by its SVD: q' . k' / sqrt(d) is near the scaled q . k at equal positions. Elsewhere they start as torch
    starts a Linear. feature_dim: 0 keeps q and k as they are.

    sliding     the window layers of the hybrid: softmax over the last window_size // 2 + 1 keys. Which layer is which
                is the recipe's to say: `"**.layers.{2,7,12}.*": {based: {sliding: true}}`.
    compressed  x_i x_j once for i <= j, with weight sqrt(2) off the diagonal: the same products from half the state.
    g_norm      the ThunderKittens form, another function: no denominator, an RMS norm (g_norm, eps 1e-5) of each head.
    eps         1e-12; 1e-6 in the kernels of flash-linear-attention.
    """

    feature_dim: int = 16
    eps: float = 1e-12
    sliding: bool = False
    window_size: int = 128
    compressed: bool = False
    g_norm: bool = False

    part = "core"
    kind = "needs recovery"
    honours = {"padding"}
    paper = "arXiv 2402.18668"
    heads_alike = False  # projections from x, which has no heads
    tries = ({"feature_dim": 0}, {"feature_dim": 4, "compressed": True}, {"sliding": True, "window_size": 6})

    def __post_init__(self) -> None:
        if self.feature_dim < 0 or self.window_size < 0:
            found = f"feature_dim={self.feature_dim}, window_size={self.window_size}"
            raise Refused(found, where="based", fits="numbers from 0 on")

    def fits(self, site: Site) -> str | None:
        if site.pattern != "causal-self":
            return f"based keeps a running state, it is causal-self; this site is {site.pattern}"
        return None

    def wanted_ports(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return ("q", "k", "v"), () if self.sliding else ("key_padding", "x")

    def _narrows(self, site: Any) -> bool:
        """Whether q and k are made anew, feature_dim wide."""
        return bool(not self.sliding and self.feature_dim not in (0, site.dim) and "x" in site.ports and site.width)

    def params(self, site: Site) -> Mapping[str, Param]:
        own: dict[str, Param] = {}
        if self._narrows(site):
            shape, start = (site.heads * self.feature_dim, site.width), uniform(site.width)
            own |= {"proj_q": Param(shape, start), "proj_k": Param(shape, start)}
        if self.g_norm and not self.sliding:
            own["g_norm"] = Param((site.v_dim,), constant(1.0))
        return own

    def starts_from(self, site: Site, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if not self._narrows(site):
            return {}
        q, k = (widened(weights[role]) for role in ("q", "k"))
        pairs = [_low_rank(q[h], k[h * site.kv_heads // site.heads], self.feature_dim, site.scale)
                 for h in range(site.heads)]  # fmt: skip
        return {
            name: torch.cat(parts) for name, parts in zip(("proj_q", "proj_k"), zip(*pairs, strict=True), strict=True)
        }

    def forward(
        self,
        site: Any,
        p: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding: Tensor | None = None,
        x: Tensor | None = None,
    ) -> Tensor:
        if self.sliding:
            reach = self.window_size // 2
            return attend(q, k, v, keep=lambda i, j: i - j <= reach, site=site)
        narrow, v = q.dtype, widened(repeat_heads(v, q))
        if self._narrows(site):
            if x is None:
                raise Refused("no x to project", where="based", fits="the port x, or feature_dim=0")
            q, k = (linear(widened(x), widened(w)).unflatten(2, (site.heads, -1)).transpose(1, 2)
                    for w in (p.proj_q, p.proj_k))  # fmt: skip
        else:
            q, k = widened(q) * (site.scale * site.dim**0.5), widened(repeat_heads(k, q))
        o: Tensor = scan(
            self._features(q),
            self._features(k),
            v,
            normaliser="none" if self.g_norm else "sum",
            eps=0.0 if self.g_norm else self.eps,
            valid=key_padding,
        )
        return as_type(rms_norm(o, o.shape[3:], widened(p.g_norm), 1e-5) if self.g_norm else o, narrow)

    def _features(self, x: Tensor) -> Tensor:
        """phi: products of them are 1 + s + s^2 / 2."""
        d = x.shape[3]
        if self.compressed:
            first, second = torch.triu_indices(d, d, device=x.device).unbind(0)
            once = (first == second).to(x.dtype)
            squares = x[..., first] * x[..., second] * (1.0 - (1.0 - 0.5**0.5) * once)
        else:
            squares = (x[..., :, None] * x[..., None, :]).flatten(3) * 0.5**0.5
        return torch.cat((torch.ones_like(x[..., :1]), x * d**-0.25, squares * d**-0.5), -1)

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(9)
        plain = Based(feature_dim=0)

        def causal(which: Mechanism, q: Tensor = q, v: Tensor = v) -> Tensor:
            return attention(q, k, v, which, causal=True)

        flat = v[:, :, :1].expand_as(v)
        yield Limit("a constant v comes out", lambda: causal(plain, v=flat), lambda: flat)
        yield Limit("queries of 0 give the running mean", lambda: causal(plain, q=0 * q),
                    lambda: v.cumsum(2) / torch.arange(1, 10)[:, None])  # fmt: skip
        yield Limit("small scores are softmax", lambda: causal(plain, q=0.005 * q),
                    lambda: attention(0.005 * q, k, v, "softmax", causal=True))  # fmt: skip
        yield Limit("compressed features have the same products",
                    lambda: causal(Based(feature_dim=0, compressed=True)), lambda: causal(plain))  # fmt: skip
        yield Limit("a wide window is softmax", lambda: causal(Based(sliding=True, window_size=16)),
                    lambda: attention(q, k, v, "softmax", causal=True))  # fmt: skip


def _low_rank(q: Tensor, k: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """(rank, C) each, whose product is that of q and k (D, C), scaled by scale * sqrt(rank), as nearly as it can be."""
    (left, a), (right, b) = (torch.linalg.qr(t.mT) for t in (q, k))
    u, s, vh = torch.linalg.svd(a @ b.mT)
    root = (s * scale * rank**0.5).sqrt()[:rank]
    new = (root[:, None] * (left @ u).mT[:rank], root[:, None] * (right @ vh.mT).mT[:rank])
    # where heads are narrower than rank, one factor is 0, and the other lets it learn
    free = torch.eye(rank - len(root), q.shape[1], dtype=q.dtype, device=q.device) * q.shape[1] ** -0.5
    return torch.cat((new[0], free)), torch.cat((new[1], torch.zeros_like(free)))
