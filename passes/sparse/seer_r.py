"""SeerAttention-R: in decoding, each token's gate chooses the blocks that its heads see (arXiv 2506.08889)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad, rms_norm
from torch.nn.init import xavier_uniform_

from ...compiler.functional import attention
from ...compiler.mechanism import Aux, Limit, Mechanism, Param, register
from ...compiler.primitives.attend import attend
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.rotary import turned
from ...compiler.site import Site
from ...compiler.starts import constant
from ...compiler.symbols import table
from .seer_gate import HIDDEN, divergence, pooled, pools

State = Mapping[str, Tensor]


@register("seer_r")
@dataclass(frozen=True)
class SeerR(Mechanism):
    """Token i sees block c of keys where its gate S_ic is high enough, all query heads of a key head the same blocks.

    S_ic = gate_dim^-1/2 Qg_i Kg_c. Qg is made of the unrotated queries of a key head's group: q_head_pool Qproj is
    sum_g q_g gate_q_weight_g, Qavg their mean, Qavgproj the mean projected. Kg is made of the unrotated keys of a whole
    block (k_pool: any of max, min, avg, written together in this order), projected by gate_k_weight. qk_norm: an RMS
    norm of each (eps 1e-6). Then Qg is rotated to i and Kg to its block's first token, base rope_theta.

    method   threshold: softmax_c(S) > threshold, 0 being all; token_budget: the token_budget // block_size highest.
             A block that is still open has S = 0, as in the paper's code; a token's own block is always seen.
    prompt   so many tokens at the start see everything before them: attention is dense until decoding starts.
    late_blocks_at_end   a block completed after the prompt is rotated to its last token, as in the paper's code.
    distill  attention is full, and the loss `gate` teaches S on earlier blocks: gate_loss_scale * KL(T, softmax S), T
             the largest weight within the block and the group, rows normalised. Its matrix is N x N.

    A Decoder holds keys and values, one Kg for each whole block and the unrotated keys of the open one; what it is
    given first is the prompt. It asks for q_nope and k_nope beside q, k and v.

    >>> q, k, v = problem(8)
    >>> full = attention(q, k, v, "seer_r", ports={"q_nope": q, "k_nope": k}, causal=True, block_size=2)
    >>> bool((full - attention(q, k, v, "softmax", causal=True)).abs().max() < 1e-6)
    True
    """

    block_size: int = 64
    gate_dim: int = 128
    q_head_pool: Literal["Qproj", "Qavgproj", "Qavg"] = "Qproj"
    k_pool: str = "maxminavg"
    method: Literal["threshold", "token_budget"] = "threshold"
    threshold: float = 0.0
    token_budget: int = 4096
    qk_norm: bool = False
    rope_theta: float = 10000.0
    prompt: int = 0
    late_blocks_at_end: bool = False
    distill: bool = False
    gate_loss_scale: float = 10.0

    part = "core"
    kind = "needs recovery"
    honours = frozenset({"padding"})
    paper = "arXiv 2506.08889"
    taught = True
    tries = (
        {"block_size": 2, "gate_dim": 4, "threshold": 0.3, "qk_norm": True},
        {"block_size": 3, "gate_dim": 8, "q_head_pool": "Qavg", "method": "token_budget", "token_budget": 3},
    )

    def __post_init__(self) -> None:
        if not pools(self.k_pool):
            raise Refused(f"k_pool={self.k_pool!r}", where="seer_r", fits="max, min, avg in this order")
        known = {"method": ("threshold", "token_budget"), "q_head_pool": ("Qproj", "Qavgproj", "Qavg")}
        for knob, names in known.items():
            if getattr(self, knob) not in names:
                raise Refused(f"{knob}={getattr(self, knob)!r}", where="seer_r", fits=", ".join(names))
        if self.block_size < 1 or self.gate_dim < 2 or self.gate_dim % 2 or min(self.token_budget, self.prompt) < 0:
            found = f"block_size={self.block_size}, gate_dim={self.gate_dim}, prompt={self.prompt}"
            raise Refused(found, where="seer_r", fits="block_size at least 1, an even gate_dim, counts from 0 on")

    def fits(self, site: Site) -> str | None:
        if site.pattern != "causal-self" or site.queries != site.keys:
            return f"seer_r gates the blocks of one causal sequence, this site is {site.pattern}"
        if self.q_head_pool == "Qavg" and self.gate_dim != site.dim:
            return (
                f"seer_r: Qavg has queries of {site.dim} channels and gate_dim={self.gate_dim}: Qavgproj projects them"
            )
        return None

    def params(self, site: Site) -> Mapping[str, Param]:
        groups, dim, size = site.kv_heads, site.dim, self.gate_dim
        shapes = {"Qproj": (groups, site.heads // groups, dim, size), "Qavgproj": (groups, dim, size), "Qavg": None}
        shape, wide = shapes[self.q_head_pool], dim * len(pools(self.k_pool))
        own = {} if shape is None else {"gate_q_weight": Param(shape, xavier_uniform_)}
        own["gate_k_weight"] = Param((groups, wide, size), xavier_uniform_)
        if self.qk_norm:
            own |= {name: Param((size,), constant(1.0)) for name in ("gate_q_norm", "gate_k_norm")}
        return own

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
        size, n = self.block_size, q.shape[2]
        count = (n + size - 1) // size
        keys, held = self._keys(p, k_nope, torch.arange(count, device=q.device), key_padding, self.prompt)
        places = torch.arange(n, device=q.device)
        scores = self._scores(p, q_nope, keys, places)
        if self.distill:
            o, weights = attend(q, k, v, outputs=("o", "weights"), site=site)
            return o, Aux(losses={"gate": self.gate_loss_scale * self._loss(scores, weights, places, held)})
        chosen = table(self._kept(scores, places, held, self.prompt))
        group = q.shape[1] // k.shape[1]
        keep = lambda b, h, i, j: chosen[b, h // group, i, j // size] != 0
        return attend(q, k, v, keep=keep, site=site)

    def state(self, site: Any, q: Tensor) -> State:
        return {}

    def prefill(
        self, site: Any, p: Any, state: State, q: Tensor, k: Tensor, v: Tensor, q_nope: Tensor, k_nope: Tensor
    ) -> tuple[Tensor, State]:
        n = q.shape[2]
        keys, waiting = self._ready(p, k_nope, 0, n)
        after = {"k": k, "v": v, "gate": keys, "open": waiting, "prompt": torch.tensor(n)}
        return attend(q, k, v, scale=site.scale, causal=True), after

    def step(
        self, site: Any, p: Any, state: State, q: Tensor, k: Tensor, v: Tensor, q_nope: Tensor, k_nope: Tensor
    ) -> tuple[Tensor, State]:
        seen, size, prompt = state["k"].shape[2], self.block_size, int(state["prompt"])
        k, v = torch.cat((state["k"], k), 2), torch.cat((state["v"], v), 2)
        fresh, waiting = self._ready(p, torch.cat((state["open"], k_nope), 2), state["gate"].shape[2], prompt)
        keys = torch.cat((state["gate"], fresh), 2)
        after = {"k": k, "v": v, "gate": keys, "open": waiting, "prompt": state["prompt"]}
        places = torch.arange(seen, k.shape[2], device=q.device)
        scores = self._scores(p, q_nope, pad(keys, (0, 0, 0, int(waiting.shape[2] > 0))), places)
        chosen = table(self._kept(scores, places, None, prompt))
        group = q.shape[1] // k.shape[1]
        keep = lambda b, h, i, j: (j <= i + seen) & (chosen[b, h // group, i, j // size] != 0)
        return attend(q, k, v, scale=site.scale, keep=keep), after

    def _ready(self, p: Any, k: Tensor, first: int, prompt: int) -> tuple[Tensor, Tensor]:
        """Kg of the whole blocks among rows, which start with block `first`, and the rows behind them."""
        count = k.shape[2] // self.block_size
        whole = k[:, :, : count * self.block_size]
        keys, _ = self._keys(p, whole, torch.arange(first, first + count, device=k.device), None, prompt)
        return keys, k[:, :, count * self.block_size :]

    def _keys(self, p: Any, k: Tensor, blocks: Tensor, real: Tensor | None, prompt: int) -> tuple[Tensor, Tensor]:
        """Kg (B, Hkv, blocks, gate_dim), in float32 or better, of the blocks that rows stand in; and which hold any."""
        size, wide = self.block_size, torch.promote_types(k.dtype, torch.float32)
        inside = torch.arange(size, device=k.device)
        numbers = (blocks - blocks[:1])[:, None] * size + inside
        keys, held = pooled(k.to(wide), numbers, real, self.k_pool)
        keys = self._normed(keys @ p.gate_k_weight.to(wide), p, "gate_k_norm")
        places = blocks * size
        if self.late_blocks_at_end:
            places = torch.where(places + size > prompt, places + size - 1, places)
        return turned(keys, places, self.rope_theta), held[:, :1]

    def _scores(self, p: Any, q: Tensor, keys: Tensor, places: Tensor) -> Tensor:
        """S (B, Hkv, rows, blocks) of rows at places; a block that is still open there has 0."""
        wide, size = keys.dtype, self.block_size
        grouped = q.to(wide).unflatten(1, (keys.shape[1], -1))  # (B, Hkv, H / Hkv, rows, D)
        if self.q_head_pool == "Qproj":
            gate = torch.einsum("bhgnd,hgde->bhne", grouped, p.gate_q_weight.to(wide))
        else:
            gate = grouped.mean(2)
            gate = gate if self.q_head_pool == "Qavg" else gate @ p.gate_q_weight.to(wide)
        gate = turned(self._normed(gate, p, "gate_q_norm"), places, self.rope_theta)
        scores = gate @ keys.mT * self.gate_dim**-0.5
        blocks = torch.arange(keys.shape[2], device=q.device)
        return torch.where((blocks + 1) * size <= places[:, None] + 1, scores, 0.0)

    def _normed(self, x: Tensor, p: Any, name: str) -> Tensor:
        return rms_norm(x, x.shape[3:], getattr(p, name).to(x.dtype), 1e-6) if self.qk_norm else x

    def _kept(self, scores: Tensor, places: Tensor, held: Tensor | None, prompt: int) -> Tensor:
        """Which blocks are seen (B, Hkv, rows, blocks)."""
        blocks, own = torch.arange(scores.shape[-1], device=scores.device), places[:, None] // self.block_size
        there = blocks <= own if held is None else (blocks <= own) & held[:, :, None]
        scores = torch.where(there, scores, HIDDEN)
        if self.method == "threshold":
            kept = torch.softmax(scores, -1) > self.threshold
        else:
            rank = scores.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
            kept = rank < self.token_budget // self.block_size
        return (kept | (blocks == own) | (places[:, None] < prompt)) & there

    def _loss(self, scores: Tensor, weights: Tensor, places: Tensor, held: Tensor) -> Tensor:
        size, groups, count = self.block_size, scores.shape[1], scores.shape[-1]
        earlier = (torch.arange(count, device=scores.device) < places[:, None] // size) & held[:, :, None]
        whole = pad(weights.detach(), (0, count * size - weights.shape[-1]))
        most = whole.unflatten(-1, (count, size)).amax(-1).unflatten(1, (groups, -1)).amax(2) * earlier
        target = most / (most.sum(-1, keepdim=True) + 1e-9)
        return divergence(torch.where(earlier, scores, HIDDEN), target, 0)

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(11)
        run = partial(attention, q, k, v, causal=True, ports={"q_nope": q, "k_nope": k})
        causal = partial(attention, q, k, v, "softmax", causal=True)
        for says, same in (
            ("a threshold below 0", SeerR(2, 4, threshold=-1.0)),
            ("a budget for all blocks", SeerR(2, 4, method="token_budget", token_budget=12)),
            ("all of it is prompt", SeerR(2, 4, threshold=2.0, prompt=11)),
            ("while it is taught", SeerR(2, 4, threshold=2.0, distill=True)),
        ):
            yield Limit(f"{says}: full attention", partial(run, same), causal)
        yield Limit("blocks of one token that see themselves", partial(run, SeerR(1, 4, threshold=2.0)), lambda: v)
