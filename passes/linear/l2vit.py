"""L2ViT's linear global attention: relu features over a denominator that is never small (arXiv 2501.16182)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...compiler.functional import attention
from ...compiler.mechanism import Limit, Mechanism, Param, register
from ...compiler.primitives.rows import as_type, repeat_heads, widened
from ...compiler.primitives.scan import scan
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.site import Site
from ...compiler.starts import constant


@register("l2vit")
@dataclass(frozen=True)
class L2ViT(Mechanism):
    """o_i = temperature_h q'_i (sum_j k'_j v_jᵀ) / max(q'_i . sum_j k'_j, denom_min), q' = relu(q), k' = relu(k).

    >>> q, k, v = problem(5)
    >>> w = torch.relu(q) @ torch.relu(k).mT
    >>> plain = w @ v / w.sum(-1, keepdim=True).clamp(min=2.0)
    >>> torch.allclose(attention(q, k, v, "l2vit", denom_min=2.0), plain, atol=1e-5)
    True

    Where the denominator is at its least, o grows with q: nothing is normalised there. temperature (H,) starts at 1,
    which leaves rows above it averages; from scratch the paper starts it at D^-0.5. The site's scale is not used.
    Causal sites have the running sums.
    """

    denom_min: float = 100.0

    part = "core"
    kind = "needs recovery"
    honours = {"padding"}
    paper = "arXiv 2501.16182"
    tries = ({}, {"denom_min": 3.0})

    def __post_init__(self) -> None:
        if not self.denom_min > 0:
            raise Refused(f"denom_min={self.denom_min}", where="l2vit", fits="a number above 0")

    def fits(self, site: Site) -> str | None:
        if site.causal and not site.self_attention:
            return f"l2vit keeps a running state with one row per query, this site is {site.pattern}"
        return None

    def params(self, site: Site) -> Mapping[str, Param]:
        return {"temperature": Param((site.heads,), constant(1.0))}

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None = None) -> Tensor:
        values = widened(repeat_heads(v, q))
        both = torch.cat((values, torch.ones_like(values[..., :1])), -1)  # a value of 1 carries the denominator along
        rows = scan(widened(q), widened(repeat_heads(k, q)), both, causal=site.causal, feature=torch.relu,
                    valid=key_padding)  # fmt: skip
        o = rows[..., :-1] / rows[..., -1:].clamp(min=self.denom_min)
        return as_type(o * widened(p.temperature)[:, None, None], q.dtype)

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(7)
        near, flat = (q.abs() + 1.0, k.abs() + 1.0), v[:, :, :1].expand_as(v)
        low = L2ViT(denom_min=1e-3)
        yield Limit("above the least denominator a constant v comes out",
                    lambda: attention(*near, flat, low), lambda: flat)  # fmt: skip
        yield Limit("and longer queries weigh the same", lambda: attention(3 * near[0], near[1], v, low),
                    lambda: attention(*near, v, low))  # fmt: skip
        high = L2ViT(denom_min=1e4)
        yield Limit("below it o grows with q", lambda: 1e3 * attention(2 * q, k, v, high),
                    lambda: 2e3 * attention(q, k, v, high))  # fmt: skip
        yield Limit("no temperature gives 0", lambda: attention(q, k, v, self, params={"temperature": torch.zeros(4)}),
                    lambda: torch.zeros_like(v))  # fmt: skip
        one = q[:, :, :1].abs(), k[:, :, :1].abs(), v[:, :, :1]
        product = (one[0] * one[1]).sum(-1, keepdim=True)
        yield Limit("one token is shortened by its product with itself", lambda: attention(*one, self),
                    lambda: one[2] * (product / self.denom_min).clamp(max=1))  # fmt: skip
