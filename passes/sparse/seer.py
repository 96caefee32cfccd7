"""SeerAttention: a learned gate on pooled queries and keys chooses the blocks that are seen (arXiv 2410.13276)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...compiler.functional import attention
from ...compiler.mechanism import Aux, Limit, Mechanism, Param, register
from ...compiler.primitives.attend import Tiles, attend
from ...compiler.primitives.rows import repeat_heads
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.rotary import turned
from ...compiler.site import Site
from ...compiler.starts import normal
from .seer_gate import HIDDEN, divergence, pooled, pools


@register("seer")
@dataclass(frozen=True)
class Seer(Mechanism):
    """Block c of keys is seen by block a of queries, c <= a, where its gate S_ac is high enough.

    S = gate_dim^-1/2 Qg Kg^T, Qg and Kg the pooled unrotated queries and keys of a block (q_pool, k_pool: any of max,
    min, avg, written together in this order), projected per head by gate_q_weight and gate_k_weight and rotated, base
    rope_theta, to the block's first token. With one q_pool and gate_dim = D there is no gate_q_weight, and each query
    head has a gate_k_weight, unless force_double.

    method       threshold: softmax_c(S) > threshold, 0 being all; nz_ratio: the max(1, int(r n)) highest of a row of n
                 blocks, r = 1 - sqrt(1 - nz_ratio).
    last_block_dense   the last two blocks of queries see all before them.
    force_diagonal     a block sees itself whatever its gate says; without it rows may stay empty, and are 0.
    past_gate    block a of queries is gated by the queries of block a - 1. Otherwise, as in the paper, by its own: then
                 what a row sees depends on later tokens of its block, though only through the choice of blocks.
    distill      attention is full, and the loss `gate` teaches S: gate_loss_scale * KL(T, softmax S) over the rows from
                 a quarter on, T_ac the largest weight within the block, rows normalised. Its matrix is N x N.

    >>> q, k, v = problem(8)
    >>> ports = {"q_nope": q, "k_nope": k}
    >>> full = attention(q, k, v, "seer", ports=ports, causal=True, block_size=2)
    >>> bool((full - attention(q, k, v, "softmax", causal=True)).abs().max() < 1e-6)
    True
    """

    block_size: int = 64
    gate_dim: int = 128
    q_pool: str = "avg"
    k_pool: str = "maxminavg"
    method: str = "threshold"
    threshold: float = 0.0
    nz_ratio: float = 1.0
    last_block_dense: bool = True
    force_double: bool = False
    force_diagonal: bool = True
    rope_theta: float = 10000.0
    past_gate: bool = False
    distill: bool = False
    gate_loss_scale: float = 10.0

    part = "core"
    kind = "needs recovery"
    honours = frozenset({"padding"})
    paper = "arXiv 2410.13276"
    taught = True
    tries = (
        {"block_size": 2, "gate_dim": 4, "threshold": 0.3, "past_gate": True, "last_block_dense": False},
        {"block_size": 3, "gate_dim": 8, "method": "nz_ratio", "nz_ratio": 0.5, "past_gate": True},
        {"block_size": 2, "gate_dim": 4},
    )

    def __post_init__(self) -> None:
        for knob in ("q_pool", "k_pool"):
            if not pools(getattr(self, knob)):
                raise Refused(f"{knob}={getattr(self, knob)!r}", where="seer", fits="max, min, avg in this order")
        if self.method not in ("threshold", "nz_ratio") or not 0 < self.nz_ratio <= 1:
            found = f"method={self.method!r}, nz_ratio={self.nz_ratio}"
            raise Refused(found, where="seer", fits="threshold or nz_ratio, 0 < nz_ratio <= 1")
        if self.block_size < 1 or self.gate_dim < 2 or self.gate_dim % 2:
            found = f"block_size={self.block_size}, gate_dim={self.gate_dim}"
            raise Refused(found, where="seer", fits="block_size at least 1, an even gate_dim")

    def fits(self, site: Site) -> str | None:
        if site.pattern != "causal-self" or site.queries != site.keys:
            return f"seer gates the blocks of one causal sequence, this site is {site.pattern}"
        return None

    def _single(self, site: Any) -> bool:
        return len(pools(self.q_pool)) == 1 and self.gate_dim == site.dim and not self.force_double

    def params(self, site: Site) -> Mapping[str, Param]:
        q_wide, k_wide = (site.dim * len(pools(names)) for names in (self.q_pool, self.k_pool))
        start = normal(0.02)
        if self._single(site):
            return {"gate_k_weight": Param((site.heads, k_wide, self.gate_dim), start)}
        return {
            "gate_q_weight": Param((site.heads, q_wide, self.gate_dim), start),
            "gate_k_weight": Param((site.kv_heads, k_wide, self.gate_dim), start),
        }

    def forward(
        self,
        site: Any,
        p: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_nope: Tensor,
        k_nope: Tensor,
        key_padding: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Aux]:
        scores = self._scores(site, p, q_nope, k_nope, key_padding)
        if self.distill:
            o, weights = attend(q, k, v, outputs=("o", "weights"), site=site)
            return o, Aux(
                losses={"gate": self.gate_loss_scale * divergence(scores, self._target(weights), scores.shape[-2] // 4)}
            )
        kept = self._kept(scores)
        listed = torch.where(kept, torch.arange(kept.shape[-1], device=q.device), -1)
        return attend(q, k, v, tiles=Tiles(listed, self.block_size, self.block_size), site=site)

    def _scores(self, site: Any, p: Any, q: Tensor, k: Tensor, real: Tensor | None) -> Tensor:
        """S (B, H, blocks, blocks), in float32 or better."""
        size, wide = self.block_size, torch.promote_types(q.dtype, torch.float32)
        count = (q.shape[2] + size - 1) // size
        numbers = torch.arange(count, device=q.device)[:, None] * size + torch.arange(size, device=q.device)
        gate_q, _ = pooled(q.to(wide), numbers, real, self.q_pool)
        gate_k, held = pooled(k.to(wide), numbers, real, self.k_pool)
        if self._single(site):
            gate_k = repeat_heads(gate_k, q)
        else:
            gate_q = gate_q @ p.gate_q_weight.to(wide)
        gate_q = turned(gate_q, numbers[:, 0], self.rope_theta)
        gate_k = repeat_heads(turned(gate_k @ p.gate_k_weight.to(wide), numbers[:, 0], self.rope_theta), q)
        scores = gate_q @ gate_k.mT * self.gate_dim**-0.5
        a, c = numbers[:, :1] // size, numbers[:, 0] // size
        if self.past_gate:  # row a of the scores is that of the block before; its own block is no choice
            scores = torch.cat((scores[..., :1, :], scores[..., :-1, :]), 2)
            return scores.masked_fill((c >= a) & (a > 0) | ~held[:, :1, None] | (c > a), HIDDEN)
        return scores.masked_fill((c > a) | ~held[:, :1, None], HIDDEN)

    def _kept(self, scores: Tensor) -> Tensor:
        """Which blocks are seen (B, H, blocks, blocks)."""
        n = scores.shape[-1]
        a, c = torch.arange(n, device=scores.device)[:, None], torch.arange(n, device=scores.device)
        if self.method == "threshold":
            kept = torch.softmax(scores, -1) > self.threshold
        else:
            most = (torch.ones((), dtype=torch.float64, device=scores.device) * n).mul(1 - math.sqrt(1 - self.nz_ratio))
            rank = scores.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
            kept = rank < most.long().clamp(min=1)
        if self.last_block_dense:
            kept = kept | (a >= n - 2)
        if self.force_diagonal or self.past_gate:
            kept = kept | (a == c)
        return kept & (c <= a)

    def _target(self, weights: Tensor) -> Tensor:
        """The largest weight of each block (B, H, blocks, blocks), rows summing to 1; nothing learns from it."""
        size = self.block_size
        count = (weights.shape[-1] + size - 1) // size
        missing = count * size - weights.shape[-1]
        whole = pad(weights.detach(), (0, missing, 0, missing))
        most = whole.unflatten(-1, (count, size)).unflatten(-3, (count, size)).amax((-3, -1))
        return most / most.sum(-1, keepdim=True).clamp(min=torch.finfo(most.dtype).tiny)

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(11)
        ports, causal = {"q_nope": q, "k_nope": k}, partial(attention, q, k, v, "softmax", causal=True)
        for says, same in (
            ("a threshold below 0", Seer(2, 4, threshold=-1.0)),
            ("all blocks by their ratio", Seer(2, 4, method="nz_ratio")),
            ("two blocks, the last ones dense", Seer(6, 4, threshold=2.0)),
            ("while it is taught", Seer(2, 4, threshold=2.0, distill=True)),
        ):
            run = partial(attention, q, k, v, same, causal=True, ports=ports)
            yield Limit(f"{says}: full attention", run, causal)
        own = partial(attention, q, k, v, Seer(1, 4, threshold=2.0, last_block_dense=False), causal=True, ports=ports)
        yield Limit("blocks of one token that see themselves", own, lambda: v)
