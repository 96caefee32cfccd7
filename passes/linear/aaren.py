"""Attention as an RNN: softmax over all rows so far, asked by one learned query per head (Aaren, arXiv 2405.13956)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...compiler.functional import attention
from ...compiler.mechanism import Limit, Mechanism, Param, register
from ...compiler.primitives.attend import attend
from ...compiler.primitives.prefix import prefix
from ...compiler.primitives.rows import as_type, repeat_heads, widened
from ...compiler.problem import problem
from ...compiler.site import Site

State = Mapping[str, Tensor]


@register("aaren")
@dataclass(frozen=True)
class Aaren(Mechanism):
    """o_n = sum_{j<=n} e^{s_j} v_j / sum_{j<=n} e^{s_j}, s_j = scale q . k_j, q (H, D) learned, the same for all rows.

    >>> q, k, v = problem(5)
    >>> o = attention(q, k, v, "aaren", causal=True, params={"q": torch.zeros(4, 8)})
    >>> torch.allclose(o[:, :, 2], v[:, :, :3].mean(2), atol=1e-6)  # the running mean
    True

    The rows' own queries are not used, so that a prefix is one number, one sum and one weighted sum: decoding keeps
    Dv + 1 numbers per head. Noncausal sites have the last prefix everywhere. q starts at 0: no row is known to matter
    before it has learned. scale: the site's own (D^-0.5) where left out; an implementation of others uses 1.
    """

    scale: float | None = None

    part = "core"
    kind = "needs recovery"
    honours = {"padding"}
    paper = "arXiv 2405.13956"
    tries = ({}, {"scale": 1.0})

    def fits(self, site: Site) -> str | None:
        if site.causal and not site.self_attention:
            return f"aaren has one prefix per row, this site is {site.pattern}"
        return None

    def params(self, site: Site) -> Mapping[str, Param]:
        return {"q": Param((site.heads, site.dim))}

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None = None) -> Tensor:
        logits, values = self._elements(site, p, q, k, v)
        if key_padding is not None:
            logits = torch.where(key_padding[:, None], logits, -torch.inf)
        if not site.causal:
            one = torch.ones_like(values[:, :, :1, :1])
            pooled = attend(one, logits[..., None], values, scale=1.0)
            return as_type(pooled, v.dtype).expand(-1, -1, q.shape[2], -1)
        o = prefix("softmax", logits, values)[0]
        return as_type(o[:, :, k.shape[2] - q.shape[2] :], v.dtype)  # fewer queries than keys are the last rows

    def _elements(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, M) scores and (B, H, M, Dv) values, what the softmax monoid is over."""
        asked = (widened(p.q) * (site.scale if self.scale is None else self.scale)).expand(k.shape[0], -1, -1)
        k, v = repeat_heads(widened(k), q), repeat_heads(widened(v), q)
        return (k * asked[:, :, None]).sum(-1), v

    def state(self, site: Any, q: Tensor) -> State:
        like = widened(q)
        empty = like.new_zeros((*q.shape[:2], 1, site.v_dim))
        return {"o": empty, "lse": like.new_full((*q.shape[:2], 1), -torch.inf)}

    def prefill(self, site: Any, p: Any, state: State, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, State]:
        o, lse = prefix("softmax", *self._elements(site, p, q, k, v), state=(state["o"], state["lse"]))
        return as_type(o, v.dtype), {"o": o[:, :, -1:], "lse": lse[:, :, -1:]}

    step = prefill

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(9)
        own = {"q": q[0, :, 0]}
        same = own["q"][None, :, None].expand_as(q)

        def causal(q: Tensor, k: Tensor = k) -> Tensor:
            return attention(q, k, v, Aaren(), causal=True, params=own)

        yield Limit("it is softmax where all queries are the learned one", lambda: causal(q),
                    lambda: attention(same, k, v, "softmax", causal=True))  # fmt: skip
        yield Limit("noncausal too", lambda: attention(q, k, v, Aaren(), params=own),
                    lambda: attention(same, k, v, "softmax"))  # fmt: skip
        yield Limit("a query of 0 gives the running mean", lambda: attention(q, k, v, self, causal=True),
                    lambda: v.cumsum(2) / torch.arange(1, 10)[:, None])  # fmt: skip
        spike = k.clone()
        spike[:, :, 3] = 1e4 * own["q"]
        yield Limit("after a spike comes its value", lambda: causal(q, spike)[:, :, 3:],
                    lambda: v[:, :, 3:4].expand(-1, -1, 6, -1))  # fmt: skip
