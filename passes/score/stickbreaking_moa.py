"""A mixture of attention heads: experts hold queries and outputs, all share keys and values (arXiv 2306.04640)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, normalize

from ...compiler.functional import attention
from ...compiler.layers import module
from ...compiler.mechanism import Aux, Limit, Mechanism, Param, register
from ...compiler.primitives.attend import attend
from ...compiler.primitives.chosen import chosen
from ...compiler.primitives.route import route
from ...compiler.problem import hidden
from ...compiler.refusal import Refused
from ...compiler.site import Site
from ...compiler.starts import normal, uniform
from ...compiler.symbols import table

GATES = ("mlp", "linear", "gmm")
LOSSES = ("mi", "switch")


@register("stickbreaking_moa")
@dataclass(frozen=True)
class StickbreakingMoA(Mechanism):
    """p = softmax(gate(x)), e_1 .. e_k its top_k experts, y = sum_s p_{e_s} stick(x W_q,e_s, K, V) W_o,e_s

    Every expert has heads_per_expert heads of att_hidden / heads_per_expert channels; K = w_k x + b_k and V = w_v x +
    b_v are those of one expert and shared. Gates count as they are, not renormalised. gate: mlp, w_gate_out gelu(w_gate
    x + b_gate) (width gate_hidden); linear, w_gate x; gmm, exp(temperature) cos(w_gate x, expert_centroids). Of equal
    gates the lower expert.

    >>> layer = module("stickbreaking_moa", dim=16, causal=True, num_experts=4, heads_per_expert=2, att_hidden=8)
    >>> layer(torch.randn(2, 5, 16)).shape, list(layer.losses())
    (torch.Size([2, 5, 16]), ['mi'])

    The loss `mi` is mean_t H(p_t) - H(mean_t p_t), minus what a token says about its expert; `switch` is
    E sum_e P_e F_e + 0.1 mean_t lse_t^2, P and F the shares of probability and of choices. Both are weighted by
    aux_weight and run over real tokens.
    In train() the last sample_topk experts are drawn from those left, by their gates; gates of padding are 0.
    A token is multiplied by the experts that it has chosen alone; attention runs over top_k * heads_per_expert heads.
    """

    num_experts: int = 32
    top_k: int = 2
    heads_per_expert: int = 8
    att_hidden: int = 512
    gate_type: str = "mlp"
    gate_hidden: int = 256
    aux_loss: str = "mi"
    aux_weight: float = 0.01
    attend_current: bool = True
    sample_topk: int = 0

    part = "region"
    kind = "needs recovery"
    honours = {"padding"}
    paper = "arXiv 2306.04640"
    tries = (
        {"num_experts": 4, "heads_per_expert": 2, "att_hidden": 8, "gate_hidden": 5},
        {
            "num_experts": 3,
            "top_k": 1,
            "heads_per_expert": 2,
            "att_hidden": 8,
            "gate_type": "linear",
            "aux_loss": "switch",
        },
        {"num_experts": 3, "heads_per_expert": 1, "att_hidden": 4, "gate_type": "gmm", "gate_hidden": 5},
    )

    def __post_init__(self) -> None:
        if self.gate_type not in GATES or self.aux_loss not in LOSSES:
            found, fits = f"gate_type={self.gate_type!r}, aux_loss={self.aux_loss!r}", f"{', '.join(GATES + LOSSES)}"
            raise Refused(found, where="stickbreaking_moa", fits=fits)
        if min(self.heads_per_expert, self.att_hidden, self.gate_hidden) < 1:
            found = f"heads_per_expert={self.heads_per_expert}, att_hidden={self.att_hidden}"
            raise Refused(f"{found}, gate_hidden={self.gate_hidden}", where="stickbreaking_moa", fits="all at least 1")
        if not 0 <= self.sample_topk <= self.top_k:
            found = f"sample_topk={self.sample_topk} of top_k={self.top_k}"
            raise Refused(found, where="stickbreaking_moa", fits="0 <= sample_topk <= top_k")
        if not 1 <= self.top_k <= self.num_experts or self.att_hidden % self.heads_per_expert:
            found = f"top_k={self.top_k} of {self.num_experts}, {self.att_hidden} / {self.heads_per_expert} channels"
            fits = "1 <= top_k <= num_experts, att_hidden a multiple of heads_per_expert"
            raise Refused(found, where="stickbreaking_moa", fits=fits)

    def fits(self, site: Site) -> str | None:
        if site.pattern != "causal-self":
            return f"stickbreaking_moa needs the order of a causal-self site, this one is {site.pattern}"
        return None if site.width else "stickbreaking_moa needs the width of x: dim=..."

    def params(self, site: Site) -> Mapping[str, Param]:
        E, C, A, G = self.num_experts, site.width, self.att_hidden, self.gate_hidden
        own = {"w_q_experts": Param((E, C, A), uniform(C * C)), "w_o_experts": Param((E, A, C), uniform(A * A))}
        for name in "kv":
            own |= {f"w_{name}": Param((A, C), uniform(C)), f"b_{name}": Param((A,), uniform(C))}
        own["w_gate"] = Param((E if self.gate_type == "linear" else G, C), uniform(C))
        if self.gate_type == "mlp":
            own |= {"b_gate": Param((G,), uniform(C)), "w_gate_out": Param((E, G), uniform(G))}
        if self.gate_type == "gmm":
            own |= {"expert_centroids": Param((E, G), normal(1.0)), "temperature": Param((1,))}
        return own

    def forward(
        self, site: Any, p: Any, x: Tensor, key_padding: Tensor | None = None, train: Tensor | None = None
    ) -> tuple[Tensor, Aux]:
        n, wide = self.heads_per_expert, torch.promote_types(x.dtype, torch.float32)
        logits = self._gate(p, x.to(wide))  # (B, N, E); who is chosen must not depend on rounding
        likely = torch.softmax(logits, -1)
        experts, gates = route(likely, self.top_k)
        if train is not None and self.sample_topk:
            experts, gates = self._sampled(likely, experts)
        if key_padding is not None:
            gates = gates * key_padding[..., None]
        picked = (experts[..., None] == torch.arange(self.num_experts, device=x.device)).to(wide)  # (B, N, k, E)
        q = chosen(x, experts, p.w_q_experts)  # (B, N, k, n * D)
        q = q.unflatten(3, (n, -1)).flatten(2, 3).transpose(1, 2)  # (B, k * n, N, D)
        k, v = (linear(x, w, b).unflatten(2, (n, -1)).transpose(1, 2) for w, b in ((p.w_k, p.b_k), (p.w_v, p.b_v)))
        o = self._attended(q, k, v, key_padding)
        o = o.transpose(1, 2).unflatten(2, (self.top_k, n)).flatten(3)  # (B, N, k, n * D)
        weighted = (gates[..., None] * o.to(wide)).to(x.dtype)
        y = chosen(weighted, experts[..., None], p.w_o_experts)[..., 0, :].sum(2, dtype=wide).to(x.dtype)
        loss = self.aux_weight * self._loss(logits, likely, picked.sum(2), key_padding)
        return y, Aux(losses={self.aux_loss: loss})

    def _sampled(self, likely: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        """The first experts as they are, the last sample_topk of them drawn anew from the rest."""
        first = experts[..., : self.top_k - self.sample_topk]
        rest = (likely.detach() + 1e-6).scatter(-1, first, 0.0)
        drawn = torch.multinomial(rest.flatten(0, 1), self.sample_topk).view(*rest.shape[:2], -1)
        experts = torch.cat((first, drawn), -1)
        return experts, likely.gather(-1, experts)

    def _gate(self, p: Any, x: Tensor) -> Tensor:
        w_gate = p.w_gate.to(x.dtype)
        match self.gate_type:
            case "mlp":
                return linear(gelu(linear(x, w_gate, p.b_gate.to(x.dtype))), p.w_gate_out.to(x.dtype))
            case "linear":
                return linear(x, w_gate)
        directions = normalize(p.expert_centroids.to(x.dtype), dim=-1)
        return linear(normalize(linear(x, w_gate), dim=-1), directions) * p.temperature.to(x.dtype).exp()

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None) -> Tensor:
        """The heads of all chosen experts; head h of each reads key head h."""
        heads = torch.arange(q.shape[1], device=q.device) % k.shape[1]
        real = None if key_padding is None else table(key_padding)

        def keep(b: Any, i: Any, j: Any) -> Any:
            seen = (j <= i) if self.attend_current else (j < i)
            return seen if real is None else seen & (real[b, j] != 0)

        o: Tensor = attend(q, k, v, keep=keep, normaliser="stick", kv_heads=heads)
        return o

    def _loss(self, logits: Tensor, likely: Tensor, picked: Tensor, key_padding: Tensor | None) -> Tensor:
        share = torch.ones_like(likely[..., :1]) if key_padding is None else key_padding[..., None].to(likely.dtype)
        share = share / share.sum().clamp(min=1)
        mean = (share * likely).sum((0, 1))
        if self.aux_loss == "mi":
            return (share * _entropy(likely)[..., None]).sum() - _entropy(mean)
        taken = (share * picked).sum((0, 1)) / self.top_k
        return self.num_experts * (mean * taken).sum() + 0.1 * (share[..., 0] * logits.logsumexp(-1) ** 2).sum()

    def limits(self) -> Iterable[Limit]:
        x = hidden(6, width=16)
        alone = module(StickbreakingMoA(1, 1, 2, 8, "linear"), dim=16, causal=True)
        w = alone.reattend.tensors

        def heads(t: Tensor) -> Tensor:
            return t.unflatten(2, (2, 4)).transpose(1, 2)

        def plain() -> Tensor:
            q, k, v = x @ w["w_q_experts"][0], linear(x, w["w_k"], w["b_k"]), linear(x, w["w_v"], w["b_v"])
            o = attention(heads(q), heads(k), heads(v), "stickbreaking", causal=True)
            return o.transpose(1, 2).flatten(2) @ w["w_o_experts"][0]

        yield Limit("one expert is plain stick-breaking", lambda: alone(x), plain)


def _entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum(-1)
