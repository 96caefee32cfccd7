"""Core context aware attention: recent tokens as they are, older ones as a weighted mean a group (arXiv 2412.12465)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...compiler.functional import attention
from ...compiler.mechanism import Limit, Mechanism, register
from ...compiler.primitives.attend import Segment, attend
from ...compiler.primitives.gather import gather
from ...compiler.primitives.group import group
from ...compiler.primitives.rows import repeat_heads
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.site import Site
from ...compiler.symbols import table

POOLS = ("cca", "mean", "max")
State = Mapping[str, Tensor]


@register("cca")
@dataclass(frozen=True)
class CCA(Mechanism):
    """One softmax over pooled keys k~_c, c < n_i, and the keys n_i g .. i; n_i = max(0, (i + 1 - window_size) // g).

    Group c holds the g = group_size tokens from c g on; k~_c and v~_c are their sums weighted by
    softmax_t(scale q_last . k_t), q_last the query of the group's last token ("cca"), their means, or their maxima
    channel by channel. Every token is represented once, no query counts a group more than once, a query sees at least
    window_size tokens as they are. Keys are pooled as they come, after rotation, with the weights of each query head.

    >>> q, k, v = problem(6)
    >>> o = attention(q, k, v, "cca", causal=True, group_size=2, window_size=2, pool_func="mean")
    >>> means = [torch.cat((t[:, :, :4].unflatten(2, (2, 2)).mean(3), t[:, :, 4:]), 2) for t in (k, v)]
    >>> bool((o[:, :, 5:] - attention(q[:, :, 5:], *means, "softmax")).abs().max() < 1e-6)  # two groups, two tokens
    True
    """

    group_size: int = 16
    window_size: int = 1024
    pool_func: str = "cca"

    part = "core"
    kind = "needs recovery"
    honours = frozenset({"padding"})
    paper = "arXiv 2412.12465"
    tries = (
        {"group_size": 2, "window_size": 3},
        {"group_size": 3, "window_size": 1, "pool_func": "mean"},
        {"group_size": 2, "window_size": 2, "pool_func": "max"},
    )

    def __post_init__(self) -> None:
        if self.group_size < 1 or self.window_size < 1:
            found = f"group_size={self.group_size}, window_size={self.window_size}"
            raise Refused(found, where="cca", fits="both at least 1")
        if self.pool_func not in POOLS:
            raise Refused(f"pool_func={self.pool_func!r}", where="cca", fits=f"one of {POOLS}")

    def fits(self, site: Site) -> str | None:
        if site.pattern != "causal-self":
            return f"cca pools what lies far behind, this site is {site.pattern}"
        if site.queries != site.keys and self.pool_func == "cca":
            return "cca pools by the queries of past tokens, which are not here"
        return None

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None = None) -> Tensor:
        size, window = self.group_size, self.window_size
        core_k, core_v, some = self._pooled(site.scale, q, repeat_heads(k, q), repeat_heads(v, q), key_padding)
        held = None if key_padding is None else table(some)

        def far(b: Any, i: Any, j: Any) -> Any:
            old = j < (i + 1 - window) // size
            return old if held is None else old & held[b, j]

        core = Segment(core_k, core_v, keep=far)
        return attend(q, k, v, keep=lambda i, j: j >= (i + 1 - window) // size * size, segments=[core], site=site)

    def state(self, site: Any, q: Tensor) -> State:
        none, few = q[:, :, :0], q[:, : site.kv_heads, :0]
        values = q.new_zeros((*q.shape[:2], 0, site.v_dim))
        raw = {"q": none, "k": few, "v": values[:, : site.kv_heads]}
        return {"core_k": none, "core_v": values, **raw, "seen": torch.zeros((), dtype=torch.long)}

    def prefill(self, site: Any, p: Any, state: State, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, State]:
        """The state is the pooled keys that the latest query saw, and what came behind them as it came."""
        size, window, seen = self.group_size, self.window_size, int(state["seen"])
        old, total = state["core_k"].shape[2], int(state["seen"]) + q.shape[2]
        raw = {name: torch.cat((state[name], t), 2) for name, t in (("q", q), ("k", k), ("v", v))}
        pooled = max(0, (total - window) // size)
        core = {name: state[name] for name in ("core_k", "core_v")}
        if pooled > old:
            new = {name: t[:, :, : (pooled - old) * size] for name, t in raw.items()}
            made = self._pooled(site.scale, new["q"], repeat_heads(new["k"], q), repeat_heads(new["v"], q), None)
            core = {name: torch.cat((t, more), 2) for (name, t), more in zip(core.items(), made, strict=False)}
        far = lambda i, j: j < (i + seen + 1 - window) // size
        first = old * size
        near = lambda i, j: (j + first <= i + seen) & (j + first >= (i + seen + 1 - window) // size * size)
        segments = [Segment(core["core_k"], core["core_v"], keep=far)] if pooled else []
        o = attend(q, raw["k"], raw["v"], scale=site.scale, keep=near, segments=segments)
        left = {name: t[:, :, (pooled - old) * size :] for name, t in raw.items()}
        return o, {**core, **left, "seen": torch.tensor(total)}

    step = prefill

    def _pooled(
        self, scale: float, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """k~ and v~ (B, H, G, D), and which groups hold a real token (B, G); no query sees the last, ragged group."""
        size, count = self.group_size, (k.shape[2] + self.group_size - 1) // self.group_size
        numbers = torch.arange(count, device=k.device)[:, None] * size + torch.arange(size, device=k.device)
        both = torch.cat((k, v), -1)
        if self.pool_func == "mean":
            pooled, held = group(both, numbers, valid=real, combine="mean")
        else:
            rows, slots = group(both, numbers, valid=real)  # (B, H, G, S, Dk + Dv), (B, H, G, S)
            held = slots.any(-1)
            pooled = (
                self._weighted(scale, q, rows, slots, numbers) if self.pool_func == "cca" else _highest(rows, slots)
            )
        core_k, core_v = pooled.split([k.shape[-1], v.shape[-1]], -1)
        return core_k, core_v, held[:, 0]

    def _weighted(self, scale: float, q: Tensor, rows: Tensor, slots: Tensor, numbers: Tensor) -> Tensor:
        heads = rows.shape[1]
        last = gather(q, numbers[:, -1])  # (B, H, G, D)
        folded = rows.flatten(1, 2)
        held = table(slots.flatten(1, 2))
        o = attend(
            last.flatten(1, 2).unsqueeze(2),
            folded[..., : q.shape[-1]],
            folded,
            scale=scale,
            keep=lambda b, h, j: held[b, h, j],
        )
        return o.squeeze(2).unflatten(1, (heads, -1))  # one group here may be many at another length

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(11)
        causal = lambda: attention(q, k, v, "softmax", causal=True)
        yield Limit("groups of one", lambda: attention(q, k, v, CCA(1, 3), causal=True), causal)
        for pool in POOLS:
            same = CCA(2, 11, pool)
            yield Limit(f"a window of n ({pool})", partial(attention, q, k, v, same, causal=True), causal)
        equal = k[:, :, ::2].repeat_interleave(2, 2)[:, :, :11]
        yield Limit(
            "equal keys in a group weigh the same",
            lambda: attention(q, equal, v, CCA(2, 3), causal=True),
            lambda: attention(q, equal, v, CCA(2, 3, "mean"), causal=True),
        )
        flat = v[:, :, :1].expand_as(v)
        yield Limit("a constant v comes out", lambda: attention(q, k, flat, CCA(2, 1), causal=True), lambda: flat)


def _highest(rows: Tensor, slots: Tensor) -> Tensor:
    top = rows.masked_fill(~slots[..., None], -math.inf).amax(-2)
    return torch.where(slots.any(-1, keepdim=True), top, 0.0)
