"""Flow attention: values compete for flow that is conserved from sources to sinks (Flowformer, arXiv 2202.06258)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...compiler.functional import attention
from ...compiler.mechanism import Limit, Mechanism, register
from ...compiler.primitives.prefix import prefix
from ...compiler.primitives.rows import as_type, repeat_heads, widened
from ...compiler.primitives.scan import scan
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.site import Site

State = Mapping[str, Tensor]


@register("flow")
@dataclass(frozen=True)
class Flow(Mechanism):
    """o_i = sigmoid(I^_i L / S) (q_i / I_i) . sum_j k_j c_j v_j, c = S softmax(clamp(O^)); q, k through a sigmoid.

    With <a, b> = (a + eps) . (b + eps): flows I_i = <q_i, sum_j k_j>, O_j = <k_j, sum_i q_i>; conserved ones
    I^_i = <q_i, sum_j k_j / O_j>, O^_j = <k_j, sum_i q_i / I_i>. Causal: every sum is over the rows so far, divided by
    their number t as the paper's causal form has it, and c_j stays what it was when row j came.

    >>> q, k, v = problem(4)
    >>> first = attention(q, k, v, "flow", causal=True)[:, :, 0]
    >>> torch.allclose(first, torch.sigmoid(torch.tensor(1.0)) * v[:, :, 0], atol=1e-4)  # nothing competes yet
    True

    clamp    of O^: 1 in the core file, 5 for language, 10 for decision making; 0 lets nothing compete.
    sum_eps  added to each of the four flows: 1e-6 in the paper's vision code.

    The site's scale is not used. Padding is no source, in self-attention no sink either, and is not counted. Decoding
    keeps five sums and a state of D x Dv. Outputs are about 0.73 as large as those of softmax: the gate of even flows.
    """

    eps: float = 1e-6
    clamp: float = 1.0
    sum_eps: float = 0.0

    part = "core"
    kind = "needs recovery"
    honours = {"padding"}
    paper = "arXiv 2202.06258"
    tries = ({}, {"clamp": 5.0, "sum_eps": 1e-6})

    def __post_init__(self) -> None:
        if self.clamp < 0:
            raise Refused(f"clamp={self.clamp}", where="flow", fits="a number from 0 on")

    def fits(self, site: Site) -> str | None:
        if site.causal and not site.self_attention:
            return f"flow counts sources and sinks together when causal, this site is {site.pattern}"
        return None

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None = None) -> Tensor:
        narrow, sinks, sources = q.dtype, torch.sigmoid(widened(q)), torch.sigmoid(widened(repeat_heads(k, q)))
        v = widened(repeat_heads(v, q))
        there = torch.ones_like(sources[..., :1])
        if key_padding is not None:
            there = there * key_padding[:, None, :, None]
        here = there if site.self_attention else torch.ones_like(sinks[..., :1])
        if site.causal:
            return as_type(self._causal(sinks * here, sources * there, v, there, None)[0], narrow)
        return as_type(self._noncausal(sinks * here, sources * there, v, here, there), narrow)

    def _noncausal(self, q: Tensor, k: Tensor, v: Tensor, here: Tensor, there: Tensor) -> Tensor:
        """Sums over all tokens; here and there are 1 where a sink and a source is real (B, H, N, 1)."""
        many, few = there.sum(2, keepdim=True), here.sum(2, keepdim=True)
        incoming, outgoing = self._flow(q, k.sum(2, keepdim=True)), self._flow(k, q.sum(2, keepdim=True))
        sink = self._flow(q, (k / outgoing).sum(2, keepdim=True))
        source = self._flow(k, (q / incoming).sum(2, keepdim=True)).clamp(-self.clamp, self.clamp)
        compete = torch.exp(source) * there
        compete = many * compete / compete.sum(2, keepdim=True).clamp(min=1e-30)
        o: Tensor = scan(q / incoming, k, compete * v, causal=False)
        return o * torch.sigmoid(sink * few / many.clamp(min=1.0))

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, there: Tensor, before: State | None) -> tuple[Tensor, State]:
        """Rows after those that `before` holds the sums of, and the sums behind them."""
        after: dict[str, Tensor] = {}

        def summed(name: str, rows: Tensor) -> Tensor:
            y: Tensor = prefix("sum", rows, state=None if before is None else (before[name],))
            after[name] = y[:, :, -1:]
            return y

        t = summed("t", there).clamp(min=1.0)
        incoming = self._flow(q, summed("K", k)) / t
        outgoing = self._flow(k, summed("Q", q)) / t
        sink = self._flow(q, summed("SK", k / outgoing)) / t
        source = (self._flow(k, summed("SQ", q / incoming)) / t).clamp(-self.clamp, self.clamp)
        compete = torch.exp(source) * there
        compete = t * compete / summed("Z", compete).clamp(min=1e-30)
        start = None if before is None else before["KV"]
        o, after["KV"] = scan(q / (incoming * t), k, compete * v, state=start, outputs=("o", "state"))
        return o * torch.sigmoid(sink), after

    def _flow(self, rows: Tensor, sums: Tensor) -> Tensor:
        return ((rows + self.eps) * (sums + self.eps)).sum(-1, keepdim=True) + self.sum_eps

    def state(self, site: Any, q: Tensor) -> State:
        shape, like = (q.shape[0], q.shape[1], 1), widened(q[..., :0])
        sizes = {"t": (1,), "K": (site.dim,), "Q": (site.dim,), "SK": (site.dim,), "SQ": (site.dim,), "Z": (1,)}
        sums = {name: like.new_zeros((*shape, *size)) for name, size in sizes.items()}
        return {**sums, "KV": like.new_zeros((*shape[:2], site.dim, site.v_dim))}

    def prefill(self, site: Any, p: Any, state: State, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, State]:
        sinks, sources = torch.sigmoid(widened(q)), torch.sigmoid(widened(repeat_heads(k, q)))
        there = torch.ones_like(sinks[..., :1])
        o, after = self._causal(sinks, sources, widened(repeat_heads(v, q)), there, state)
        return as_type(o, q.dtype), after

    step = prefill

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(9)
        one, gate = k[:, :, :1].expand_as(k), torch.sigmoid(torch.tensor(1.0))
        bare = Flow(eps=0.0)
        yield Limit("even flows give the mean, gated", lambda: attention(one, one, v, bare)[:, :, :1],
                    lambda: gate * v.mean(2, keepdim=True))  # fmt: skip
        yield Limit("the first causal row is its own value, gated",
                    lambda: attention(q, k, v, bare, causal=True)[:, :, :1], lambda: gate * v[:, :, :1])  # fmt: skip
        yield Limit("sources have no order", lambda: attention(q, k.flip(2), v.flip(2), self),
                    lambda: attention(q, k, v, self))  # fmt: skip
        yield Limit("flow is conserved: values that undo the competition come out gated alike",
                    lambda: attention(q, one, v[:, :, :1].expand_as(v), bare) / _gates(q, one),
                    lambda: v[:, :, :1].expand_as(v))  # fmt: skip


def _gates(q: Tensor, k: Tensor) -> Tensor:
    """sigmoid(I^ L / S) where all sources are equal: I^_i = S q_i . k / sum_i' q_i' . k."""
    products = (torch.sigmoid(q) * torch.sigmoid(k)).sum(-1, keepdim=True)
    return torch.sigmoid(products / products.mean(2, keepdim=True))
