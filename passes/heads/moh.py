"""Mixture of heads: a router decides per token which heads count, and how much (MoH, arXiv 2410.11842)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ...compiler.functional import attention
from ...compiler.mechanism import Aux, Limit, Mechanism, Param, register
from ...compiler.problem import hidden, problem
from ...compiler.refusal import Refused
from ...compiler.site import Site

ROUTERS = ("linear", "q_norm")


@register("moh")
@dataclass(frozen=True)
class MoH(Mechanism):
    """o_h becomes gate_h o_h: the first shared_heads always count, of the others routed_heads are chosen per token.

    linear: p = softmax(w_router x), T its routed_heads largest, g_r = k p / sum_T p within T and 0 outside;
    g_s = h_s softmax(w_shared x); both are weighted by 2 softmax(w_balance x). Loss load_balance, weighted by
    load_balance_weight: h_r sum_i P_i F_i, P_i the mean of p_i, F_i the share of tokens that chose head i.
    q_norm: the heads whose query (before rotation, which leaves norms alone) is longest, a mask of 0 and 1 without
    learned tensors; no gradient reaches the choice. Equal scores: the lower head first.

    >>> q, k, v = problem()
    >>> o = attention(q, k, v, "moh", shared_heads=2, routed_heads=1, router="q_norm")
    >>> (o.abs().sum(-1) > 0).sum(1).unique()  # active heads of each token
    tensor([3])

    Left out, shared_heads is a half and routed_heads a quarter of the heads, as in MoH-LLaMA3-8B. Routers start at 0:
    with routed_heads = h_r, or all heads shared, that is the attention without gates.
    """

    shared_heads: int | None = None
    routed_heads: int | None = None
    router: str = "linear"
    load_balance_weight: float = 0.01

    part = "gate"
    kind = "needs recovery"
    paper = "arXiv 2410.11842"
    heads_alike = False
    heads_apart = False  # heads compete for a place among the routed ones
    tries = (
        {},
        {"shared_heads": 0, "routed_heads": 2},
        {"shared_heads": 1, "routed_heads": 1},
        {"shared_heads": 2, "routed_heads": 1, "router": "q_norm"},
    )

    def __post_init__(self) -> None:
        if self.router not in ROUTERS:
            raise Refused(f"router={self.router!r}", where="moh", fits=f"one of {', '.join(ROUTERS)}")

    def counts(self, heads: int) -> tuple[int, int]:
        """(shared, routed and active) heads."""
        shared = heads // 2 if self.shared_heads is None else self.shared_heads
        routed = min(max(heads // 4, 1), heads - shared) if self.routed_heads is None else self.routed_heads
        return shared, routed

    def fits(self, site: Site) -> str | None:
        shared, routed = self.counts(site.heads)
        if shared < 0 or routed < 0 or not 1 <= shared + routed <= site.heads:
            return f"moh: {shared} shared and {routed} routed heads, this site has {site.heads}"
        if self.router == "linear" and not site.width:
            return "moh needs the width of x, which is not known here"
        return None

    def wanted_ports(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (("o", "x"), ()) if self.router == "linear" else (("o", "q"), ("q_nope",))

    def params(self, site: Site) -> Mapping[str, Param]:
        if self.router == "q_norm":
            return {}
        shared, routed = self.counts(site.heads)
        own = {}
        if routed:
            own["w_router"] = Param((site.heads - shared, site.width))
        if shared > 1:
            own["w_shared"] = Param((shared, site.width))
        if shared and routed:
            own["w_balance"] = Param((2, site.width))
        return own

    def forward(
        self,
        site: Any,
        p: Any,
        o: Tensor,
        x: Tensor | None = None,
        q: Tensor | None = None,
        q_nope: Tensor | None = None,
    ) -> tuple[Tensor, Aux]:
        shared, routed = self.counts(site.heads)
        if self.router == "linear":
            assert x is not None
            gates, losses = self._linear(p, x, shared, routed, site.heads)
        else:
            plain = q_nope if q_nope is not None else q
            assert plain is not None
            gates, losses = self._q_norm(plain, shared, routed), {}
        return o * gates.mT[..., None].to(o.dtype), Aux(losses=losses)  # gates (B, N, H)

    def _linear(self, p: Any, x: Tensor, shared: int, routed: int, heads: int) -> tuple[Tensor, dict[str, Tensor]]:
        wide = torch.promote_types(x.dtype, torch.float32)

        def softmax(w: Tensor) -> Tensor:
            return torch.softmax(linear(x, w).to(wide), -1)

        g_s = shared * softmax(p.w_shared) if shared > 1 else x.new_ones((*x.shape[:2], shared), dtype=wide)
        if not routed:
            return torch.cat((g_s, g_s.new_zeros((*x.shape[:2], heads - shared))), -1), {}
        likely = softmax(p.w_router)
        chosen = _largest(likely, routed)
        held = likely * chosen
        g_r = routed * held / held.sum(-1, keepdim=True).clamp(min=torch.finfo(wide).eps)
        balance = likely.mean((0, 1)) * chosen.mean((0, 1))
        losses = {"load_balance": self.load_balance_weight * (heads - shared) * balance.sum()}
        if not shared:
            return g_r, losses
        a = 2 * softmax(p.w_balance)
        return torch.cat((a[..., :1] * g_s, a[..., 1:] * g_r), -1), losses

    def _q_norm(self, q: Tensor, shared: int, routed: int) -> Tensor:
        norms = torch.linalg.vector_norm(q.detach(), dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).mT
        chosen = _largest(norms[..., shared:], routed)
        return torch.cat((torch.ones_like(norms[..., :shared]), chosen), -1)

    def limits(self) -> Iterable[Limit]:
        (q, k, v), ports = problem(), {"x": hidden()}
        softmax = lambda: attention(q, k, v, "softmax")
        yield Limit("all heads routed", lambda: attention(q, k, v, MoH(0, 4), ports=ports), softmax)
        yield Limit("all heads shared", lambda: attention(q, k, v, MoH(4, 0), ports=ports), softmax)
        yield Limit("all routed beside shared ones", lambda: attention(q, k, v, MoH(1, 3), ports=ports), softmax)
        yield Limit("all heads long", lambda: attention(q, k, v, MoH(2, 2, "q_norm")), softmax)


def _largest(scores: Tensor, k: int) -> Tensor:
    """1 at the k largest of the last axis, the lower index first among equals."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(scores).scatter(-1, order, 1.0)
