"""Linear attention: o_i = phi(q_i) . sum_j phi(k_j) v_j / phi(q_i) . sum_j phi(k_j) (arXiv 2006.16236)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...compiler.functional import attention
from ...compiler.mechanism import Limit, Mechanism, register
from ...compiler.primitives.scan import scan
from ...compiler.problem import problem
from ...compiler.refusal import Refused, nearest
from ...compiler.site import Site

FEATURES: dict[str, Callable[[Any], Any]] = {
    "elu": lambda x: torch.nn.functional.elu(x) + 1.0,
    "relu": torch.relu,
    "exp": torch.exp,
    "identity": lambda x: x,
}


@register("linear")
@dataclass(frozen=True)
class Linear(Mechanism):
    """Softmax's exp(q . k) replaced by phi(q) . phi(k), so that a state of D x Dv stands for all keys seen so far.

    >>> q, k, v = problem(5)
    >>> phi_q, phi_k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    >>> weights = (phi_q @ phi_k.mT).tril()
    >>> plain = weights @ v / weights.sum(-1, keepdim=True)
    >>> torch.allclose(attention(q, k, v, "linear", causal=True), plain, atol=1e-5)
    True

    The site's scale is not used: phi decides what a long vector means. A row whose weights sum to 0 (relu) gives 0.
    """

    feature_map: str = "elu"
    normalize: bool = True
    eps: float = 0.0

    part = "core"
    kind = "needs recovery"
    honours = {"padding", "packed"}
    paper = "arXiv 2006.16236"
    tries = ({}, {"feature_map": "relu", "eps": 1e-3}, {"feature_map": "identity", "normalize": False})

    def __post_init__(self) -> None:
        if self.feature_map not in FEATURES:
            raise Refused(f"feature_map {self.feature_map!r}", where="linear", fits=nearest(self.feature_map, FEATURES))

    def fits(self, site: Site) -> str | None:
        if site.causal and not site.self_attention:
            return f"linear keeps a running state with one row per query, this site is {site.pattern}"
        if "packed" in site.features and "documents" not in site.ports:
            return "linear starts anew with each document: their ids must be a running count of where one begins"
        return None

    def forward(
        self,
        site: Any,
        p: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        return scan(
            q,
            k,
            v,
            causal=site.causal,
            feature=FEATURES[self.feature_map],
            normaliser="sum" if self.normalize else "none",
            eps=self.eps,
            reset=documents if "packed" in site.features else None,
            valid=key_padding,  # a key that is padding leaves the state as it is
        )

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(7)
        equal = k[:, :, :1].expand_as(k)
        yield Limit("equal keys give the mean value", lambda: attention(q, equal, v, Linear())[:, :, :1],
                    lambda: v.mean(2, keepdim=True))  # fmt: skip
        yield Limit("the last causal row is the noncausal one",
                    lambda: attention(q, k, v, self, causal=True)[:, :, -1:],
                    lambda: attention(q[:, :, -1:], k, v, self))  # fmt: skip
        yield Limit("identity without a normaliser is (q kᵀ) v",
                    lambda: attention(q, k, v, Linear("identity", normalize=False)), lambda: q @ k.mT @ v)  # fmt: skip
