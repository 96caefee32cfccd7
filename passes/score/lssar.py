"""Softplus weights of cosines, then only what is above a row's mean, sharpened (LSSAR, arXiv 2501.13428)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad, softplus

from ...compiler.functional import attention
from ...compiler.mechanism import Limit, Mechanism, register
from ...compiler.primitives.attend import attend
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.site import Site
from ...compiler.symbols import table
from .seen_keys import seen_keys


@register("lssar")
@dataclass(frozen=True)
class Lssar(Mechanism):
    """s_ij = softplus(ln D ln n_i cos(q_i, k_j)), a_ij = s_ij / (sum_l s_il + eps)      (without reweight: o = a v)
    b_ij = relu(n_i a_ij - o_i)^p, o_i = offset (0 in the first rows), o = b v / (sum_l b_il + eps)

    n_i is the number of keys that row i may see, i on a causal site; the mean of n_i a_ij is 1, so that with offset 1
    only keys above a row's mean count, and a row of equal scores gives 0. The first rows are those with n_i <=
    offset_free_rows, which is the row's number on a causal site (on others, where the paper says nothing, it is not).

    >>> q, k, v = problem(6)
    >>> alike = attention(q, k[:, :, :1].expand_as(k), v, "lssar", causal=True)  # nothing stands out
    >>> (alike.abs().amax((0, 1, 3)) > 1e-6).int().tolist()
    [1, 1, 1, 0, 0, 0]

    The second stage is a softmax of p ln(n_i a_ij - o_i), whose running maximum is what keeps x^15 in range, with a
    virtual key of logit ln eps. eps is not harmless: at p = 15 a row whose best key is 0.3 above its mean is halved by
    1e-8 (the choice of a re-implementation; the paper's own code is not public). eps = 0 is the definition.
    Queries and keys are taken as they stand, after rotation.
    """

    reweight: bool = True
    p: float = 15
    offset: float = 1.0
    offset_free_rows: int = 3
    eps: float = 1e-8

    part = "core"
    kind = "needs recovery"
    honours = {"padding", "dropout"}
    least = {"offset_free_rows": 0}
    paper = "arXiv 2501.13428"
    tries = ({}, {"reweight": False}, {"p": 3, "eps": 0.0})

    def __post_init__(self) -> None:
        if self.p < 1 or self.eps < 0:
            raise Refused(f"p={self.p}, eps={self.eps}", where="lssar", fits="p >= 1, eps >= 0")

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None = None) -> Tensor:
        here, last = partial(attend, site=site), site.causal or site.spec.align == "end"
        past = k.shape[2] - q.shape[2] if last else 0
        return self._weighed(here, site.scale, seen_keys(site, q, k, key_padding), past, q, k, v)

    def _weighed(
        self, attend: Callable[..., Any], scale: float, n: Tensor, past: Any, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """Both stages, by an attend with the site's mask and scale, which is taken back; row 0 stands at `past`."""
        wide = n.dtype
        q = normalize(q.to(wide), dim=-1) * (n.log() * (math.log(q.shape[-1]) / scale))[:, None, :, None]
        k, v, narrow = normalize(k.to(wide), dim=-1), v.to(wide), v.dtype
        if not self.reweight:
            o: Tensor = attend(q, k, v, weight=softplus, normaliser="sum", eps=self.eps)
            return o.to(narrow)
        log_sum = attend(q, k, v, weight=softplus, normaliser="none", outputs=("lse",))  # (B, H, N)
        total = log_sum.exp() + self.eps
        share = table(pad(n[:, None] / torch.where(total > 0, total, 1.0), (past, 0)))  # an empty row sums to 0
        taken = table(pad(self._offsets(n), (past, 0)))

        def score(s: Any, b: Any, h: Any, i: Any) -> Any:
            above: Any = softplus(s) * share[b, h, i] - taken[b, i]
            return torch.where(above > 0, self.p * torch.log(torch.where(above > 0, above, 1.0)), -math.inf)

        sink = (lambda: math.log(self.eps)) if self.eps else None
        reweighted: Tensor = attend(q, k, v, score=score, sink=sink)
        return reweighted.to(narrow)

    def _offsets(self, n: Tensor) -> Tensor:
        return torch.where(n <= self.offset_free_rows, 0.0, self.offset).to(n.dtype)

    def state(self, site: Site, q: Tensor) -> Mapping[str, Tensor]:
        return {}

    def prefill(
        self, site: Site, p: Any, state: Mapping[str, Tensor], q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """All keys and values are kept, as softmax keeps them; each step sweeps over them twice."""
        if state:
            k, v = torch.cat((state["k"], k), 2), torch.cat((state["v"], v), 2)
        here = partial(attend, causal=True, scale=site.scale, align="end")
        return self._weighed(here, site.scale, seen_keys(site, q, k), k.shape[2] - q.shape[2], q, k, v), {
            "k": k,
            "v": v,
        }

    step = prefill

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(9)
        u = v[:, :, :1].expand_as(v)
        plain = Lssar(reweight=False)
        yield Limit("without reweighting rows sum to 1", lambda: attention(q, k, u, plain, causal=True), lambda: u)
        yield Limit(
            "only directions count", lambda: attention(3 * q, 0.1 * k, v, self), lambda: attention(q, k, v, self)
        )
        yield Limit("one key gives its value", lambda: attention(q[:, :, :1], k[:, :, :1], v[:, :, :1], self),
                    lambda: v[:, :, :1])  # fmt: skip
        for causal in (True, False):
            n = torch.arange(1, 10.0)[:, None] if causal else torch.full((9, 1), 9.0)
            seen = torch.ones(9, 9).tril() if causal else torch.ones(9, 9)
            s = seen * softplus(math.log(8) * n.log() * (normalize(q, dim=-1) @ normalize(k, dim=-1).mT))
            above = seen * torch.relu(s - torch.where(n > 3, s.sum(-1, keepdim=True) / n, 0.0)) ** 3
            yield Limit(
                f"it is the threshold at the row's mean ({'causal' if causal else 'noncausal'})",
                lambda c=causal: attention(q, k, v, Lssar(p=3, eps=0.0), causal=c),  # type: ignore[misc]
                lambda w=above: w / w.sum(-1, keepdim=True) @ v,  # type: ignore[misc]
            )
