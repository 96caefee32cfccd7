"""Queries and keys normalised before their product, so that logits cannot grow without bound (arXiv 2309.14322)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...compiler.functional import attention
from ...compiler.live import KEPT
from ...compiler.mechanism import Limit, Mechanism, Param, register
from ...compiler.primitives.attend import attend
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.site import Site
from ...compiler.starts import constant

EPS = {"layernorm": 1e-5, "rmsnorm": 1e-6, "l2": 1e-12}
SCOPES = ("head", "full")


@register("qk_norm")
@dataclass(frozen=True)
class QkNorm(Mechanism):
    """logit_ij = softmax_scale norm(q_i) . norm(k_j); layernorm: (q - mean) / sqrt(var + eps) w + b, rmsnorm:
    q / sqrt(mean q^2 + eps) w, over the D channels of a head or (scope full) over all heads side by side.
    l2: logit_ij = exp(min(temperature_h, ln 100)) cos(q_i, k_j), without weights.

    q_norm_weight, k_norm_weight start at 1: (D,), per_head (H, D) and (Hkv, D), full (H * D,) and (Hkv * D,); with bias
    (layernorm) q_norm_bias, k_norm_bias of the same shapes start at 0; temperature (H,) starts at ln 10. softmax_scale
    is the site's where left out; mu_p: 1 / D. softcap: s <- softcap tanh(s / softcap).

    >>> q, k, v = problem(5)
    >>> one, other = (attention(t, k, v, "qk_norm", norm="rmsnorm") for t in (q, 7 * q))
    >>> bool((one - other).abs().max() < 1e-4)
    True

    Where the site rotates, what was projected is normalised and then rotated by the site's own angles: in halves
    (llama) or, interleaved, in neighbouring pairs; left out, as the graph has it. It needs training: per token a scale
    is lost for good. The paper's z-loss is a loss on the output logits and no rewrite of attention.
    """

    norm: str = "layernorm"
    scope: str = "head"
    per_head: bool = False
    bias: bool = False
    eps: float | None = None
    softmax_scale: float | None = None
    mu_p: bool = False
    softcap: float | None = None
    interleaved: bool | None = None

    part = "core"
    kind = "needs recovery"
    honours = KEPT
    paper = "arXiv 2309.14322"
    heads_apart = False  # scope full
    tries = (
        {},
        {"norm": "rmsnorm", "per_head": True, "softcap": 5.0},
        {"scope": "full", "bias": True, "mu_p": True},
        {"norm": "l2"},
    )

    def __post_init__(self) -> None:
        if self.norm not in EPS or self.scope not in SCOPES:
            found = f"norm={self.norm!r}, scope={self.scope!r}"
            raise Refused(found, where="qk_norm", fits=f"{', '.join(EPS)}; {', '.join(SCOPES)}")
        if (self.bias and self.norm != "layernorm") or (self.scope == "full" and (self.per_head or self.norm == "l2")):
            found = f"norm={self.norm!r}, scope={self.scope!r}, bias={self.bias}, per_head={self.per_head}"
            raise Refused(found, where="qk_norm", fits="bias with layernorm; scope='full' without per_head and l2")
        if self.softcap is not None and self.softcap <= 0:
            raise Refused(f"softcap={self.softcap}", where="qk_norm", fits="a number above 0, or none")
        if self.eps is not None and self.eps < 0:
            raise Refused(f"eps={self.eps}", where="qk_norm", fits="a number from 0 on, or none")

    def fits(self, site: Site) -> str | None:
        if self.softcap is not None and site.features & {"bias", "softcap"}:
            return "qk_norm's softcap comes before a bias, and this site's score is capped or biased already"
        if "rope" in site.features and not {"q_nope", "k_nope"} <= set(site.ports):
            return "qk_norm comes before a rotation, and what was rotated here is not known"
        if "rope" in site.features and self.interleaved is None and not site.pairs:
            return "qk_norm comes before a rotation, and which channels it pairs is not known: interleaved says it"
        return None

    def params(self, site: Site) -> Mapping[str, Param]:
        if self.norm == "l2":
            return {"temperature": Param((site.heads,), constant(math.log(10)))}
        own = {}
        for name, heads in (("q", site.heads), ("k", site.kv_heads)):
            full, each = (heads * site.dim,), (heads, site.dim)
            shape = full if self.scope == "full" else each if self.per_head else (site.dim,)
            own[f"{name}_norm_weight"] = Param(shape, constant(1.0))
            if self.bias:
                own[f"{name}_norm_bias"] = Param(shape)
        return own

    def forward(
        self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor, q_nope: Tensor | None = None,
        k_nope: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        q = self._normed(p, "q", q if q_nope is None else q_nope)
        k = self._normed(p, "k", k if k_nope is None else k_nope)
        if k.shape[2] != v.shape[2]:
            found = f"{k.shape[2]} keys before their rotation, {v.shape[2]} values: a cache keeps rotated keys"
            raise Refused(found, where="qk_norm", fits="use_cache=False")
        if q_nope is not None and cos is not None and sin is not None:
            pairs = site.pairs == "neighbours" if self.interleaved is None else self.interleaved
            q, k = (self._rotated(t, cos, sin, pairs) for t in (q, k))
        scale = 1 / site.dim if self.mu_p else site.scale if self.softmax_scale is None else self.softmax_scale
        if self.norm == "l2":
            wide = torch.promote_types(q.dtype, torch.float32)
            heat = p.temperature.to(wide).clamp(max=math.log(100)).exp()[:, None, None]
            q, scale = (q * heat).to(q.dtype), 1.0
        cap = self.softcap
        q = q * (scale / site.scale)
        return attend(q, k, v, score=None if cap is None else lambda s: torch.tanh(s / cap) * cap, site=site)

    def _normed(self, p: Any, name: str, t: Tensor) -> Tensor:
        wide = torch.promote_types(t.dtype, torch.float32)
        x, eps = t.to(wide), EPS[self.norm] if self.eps is None else self.eps
        if self.norm == "l2":
            return torch.nn.functional.normalize(x, dim=-1, eps=eps).to(t.dtype)
        over = (1, 3) if self.scope == "full" else (3,)
        if self.norm == "layernorm":
            x = x - x.mean(over, keepdim=True)
        x = x * torch.rsqrt(x.square().mean(over, keepdim=True) + eps) * self._by_head(p, f"{name}_norm_weight", t)
        return (x + self._by_head(p, f"{name}_norm_bias", t) if self.bias else x).to(t.dtype)

    def _by_head(self, p: Any, name: str, t: Tensor) -> Tensor:
        """A weight as it stands over (B, H, N, D)."""
        weight: Tensor = getattr(p, name).to(torch.promote_types(t.dtype, torch.float32))
        if self.scope == "full":
            weight = weight.unflatten(0, (t.shape[1], t.shape[3]))
        return weight[:, None] if weight.ndim == 2 else weight

    def _rotated(self, t: Tensor, cos: Tensor, sin: Tensor, pairs: bool) -> Tensor:
        """Turned by the site's angles (B|1, N, R) or (B|1, 1, N, R); channels behind the first R stay."""
        cos, sin = (a if a.ndim == 4 else a.unsqueeze(-3) for a in (cos, sin))
        head, tail = t[..., : cos.shape[-1]], t[..., cos.shape[-1] :]
        if pairs:
            turned = torch.stack((-head[..., 1::2], head[..., ::2]), -1).flatten(-2)
        else:
            first, second = head.chunk(2, -1)
            turned = torch.cat((-second, first), -1)
        return torch.cat((head * cos + turned * sin, tail), -1).to(t.dtype)

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(7)
        unit, flat = (t / t.square().mean(-1, keepdim=True).sqrt() for t in (q, k))
        rms = QkNorm("rmsnorm")
        yield Limit("rows of length sqrt(D) are as they were", lambda: attention(unit, flat, v, rms),
                    lambda: attention(unit, flat, v, "softmax"))  # fmt: skip
        yield Limit("a length of each token does not count", lambda: attention(q * q[..., :1].abs().exp(), k, v, rms),
                    lambda: attention(q, k, v, rms))  # fmt: skip
        yield Limit("nor does a constant under layernorm", lambda: attention(q + 3, k, v, QkNorm()),
                    lambda: attention(q, k, v, QkNorm()), 1e-4)  # fmt: skip
        yield Limit("a far cap is none", lambda: attention(q, k, v, QkNorm(softcap=1e4)),
                    lambda: attention(q, k, v, QkNorm()))  # fmt: skip
