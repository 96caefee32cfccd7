"""Softmax attention: o_i = sum_j softmax_j(scale * q_i . k_j) v_j (Attention Is All You Need, arXiv 1706.03762)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...compiler.functional import attention
from ...compiler.live import KEPT
from ...compiler.mechanism import Limit, Mechanism, register
from ...compiler.primitives.attend import attend
from ...compiler.problem import problem


@register("softmax")
@dataclass(frozen=True)
class Softmax(Mechanism):
    """What stands at a site already, so that rewriting to it changes no number; the best kernel for its mask is chosen.

    >>> q, k, v = problem()
    >>> plain = torch.softmax(q @ k.mT * 8**-0.5, -1) @ v
    >>> torch.allclose(attention(q, k, v, "softmax"), plain, atol=1e-6)
    True
    """

    part = "core"
    kind = "exact"
    honours = KEPT
    paper = "arXiv 1706.03762"

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, site=site)

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem()
        yield Limit(
            "it is torch's own attention",
            lambda: attention(q, k, v, self),
            lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v),
        )
        yield Limit("equal keys give the mean value", lambda: attention(q, 0 * k, v, self)[:, :, :1],
                    lambda: v.mean(2, keepdim=True))  # fmt: skip
        yield Limit("the first causal query sees one key", lambda: attention(q, k, v, self, causal=True)[:, :, 0],
                    lambda: v[:, :, 0])  # fmt: skip
