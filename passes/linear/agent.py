"""Agent attention: a few agent tokens collect from the keys and hand out to the queries (arXiv 2312.08874)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, adaptive_avg_pool2d, conv1d, conv2d, interpolate, pad

from ...compiler.functional import attention
from ...compiler.mechanism import Limit, Mechanism, Param, register
from ...compiler.primitives.attend import attend
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.site import Site
from ...compiler.symbols import table


@register("agent")
@dataclass(frozen=True)
class Agent(Mechanism):
    """o = softmax_A(scale q aᵀ + b2) softmax_M(scale a kᵀ + b1) v + dwc(v), the agents a being q pooled to A tokens.

    >>> q, k, v = problem(9)
    >>> o = attention(q, k, v, "agent", agent_num=1, grid=(3, 3))
    >>> mean = attention(q.mean(2, keepdim=True), k, v, "softmax")  # a single agent is the mean query
    >>> bool((o - mean).abs().max() < 1e-6)
    True

    On a grid (h, w) the agents are P x P means (agent_num = P * P), biases are resized bilinearly from a square of
    bias_base and dwc is a depthwise convolution; prefix tokens take part in both attentions, not in pooling and dwc.
    On a sequence all three are one-dimensional. kv_grid: the keys' own grid where they were spatially reduced.
    Biases and dwc start at 0, closest to softmax attention (from scratch the paper draws biases with deviation 0.02).
    """

    agent_num: int = 49
    scale: float | None = None
    bias_base: int = 7
    dwc_kernel: int = 3
    use_bias: bool = True
    use_dwc: bool = True
    kv_grid: tuple[int, int] | None = None

    part = "core"
    kind = "needs recovery"
    honours = frozenset[str]()
    paper = "arXiv 2312.08874"
    tries = ({"agent_num": 4, "bias_base": 3}, {"agent_num": 9, "use_dwc": False}, {"agent_num": 1, "use_bias": False})

    def __post_init__(self) -> None:
        if min(self.agent_num, self.bias_base, self.dwc_kernel) < 1 or self.dwc_kernel % 2 == 0:
            found = f"agent_num={self.agent_num}, bias_base={self.bias_base}, dwc_kernel={self.dwc_kernel}"
            raise Refused(found, where="agent", fits="agent_num, bias_base >= 1, an odd dwc_kernel")
        if self.kv_grid is not None:
            object.__setattr__(self, "kv_grid", tuple(self.kv_grid))

    def fits(self, site: Site) -> str | None:
        if site.causal:
            return f"agent is noncausal, this site is {site.pattern}"
        if site.grid is not None and self._side**2 != self.agent_num:
            return f"agent_num={self.agent_num} is no square, the agents of a grid are P x P: 9, 16, 49, ..."
        keys = self._key_grid(site)
        if keys is not None and site.keys.isdigit() and site.grid.prefix + keys[0] * keys[1] != int(site.keys):  # type: ignore[union-attr]
            return f"{site.keys} keys are not a grid of {keys[0]} x {keys[1]} with its prefix: give kv_grid"
        return None

    @property
    def _side(self) -> int:
        return math.isqrt(self.agent_num)

    def _key_grid(self, site: Any) -> tuple[int, int] | None:
        return None if site.grid is None else self.kv_grid or (site.grid.h, site.grid.w)

    def params(self, site: Site) -> Mapping[str, Param]:
        heads, agents, own = site.heads, self.agent_num, {}
        sides = 1 if site.grid is None else 2
        if self.use_bias:
            for name in ("an_bias", "na_bias"):
                own[name] = Param((heads, agents, *[self.bias_base] * sides))
        if self.use_bias and site.grid is not None:
            (kh, kw), (h, w) = self._key_grid(site) or (0, 0), (site.grid.h, site.grid.w)
            own |= {"ah_bias": Param((1, heads, agents, kh, 1)), "aw_bias": Param((1, heads, agents, 1, kw))}
            own |= {"ha_bias": Param((1, heads, h, 1, agents)), "wa_bias": Param((1, heads, 1, w, agents))}
            if site.grid.prefix:
                own["ac_bias"] = Param((1, heads, agents, site.grid.prefix))
                own["ca_bias"] = Param((1, heads, site.grid.prefix, agents))
        if self.use_dwc:
            channels = heads * site.v_dim
            own["dwc_weight"] = Param((channels, 1, *[self.dwc_kernel] * sides))
            own["dwc_bias"] = Param((channels,))
        return own

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = site.scale if self.scale is None else self.scale
        a = self._agents(site, q)
        b1, b2 = self._biases(site, p, q, k) if self.use_bias else (None, None)
        collected = attend(a, k, v, scale=scale, score=_plus(b1))  # (B, H, A, Dv)
        o = attend(q, a, collected, scale=scale, score=_plus(b2))
        return o + self._convolved(site, p, q, v) if self.use_dwc else o

    def _agents(self, site: Any, q: Tensor) -> Tensor:
        """q pooled to A tokens, by torch's rule for ragged windows."""
        if site.grid is None:
            pooled = adaptive_avg_pool1d(_channels(q), self.agent_num)
        else:
            image = _channels(q[:, :, site.grid.prefix :]).unflatten(2, (site.grid.h, site.grid.w))
            pooled = adaptive_avg_pool2d(image, self._side).flatten(2)
        return pooled.unflatten(1, (q.shape[1], q.shape[3])).mT  # (B, H, A, D)

    def _biases(self, site: Any, p: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """(H, A, M) for the agents over the keys, (H, N, A) for the queries over the agents."""
        if site.grid is None:
            return interpolate(p.an_bias, k.shape[2], mode="linear"), interpolate(
                p.na_bias, q.shape[2], mode="linear"
            ).mT
        b1 = interpolate(p.an_bias, self._key_grid(site), mode="bilinear") + (p.ah_bias + p.aw_bias)[0]
        b2 = interpolate(p.na_bias, (site.grid.h, site.grid.w), mode="bilinear").movedim(1, 3)
        b1, b2 = b1.flatten(2), (b2 + (p.ha_bias + p.wa_bias)[0]).flatten(1, 2)
        if site.grid.prefix:
            return torch.cat((p.ac_bias[0], b1), 2), torch.cat((p.ca_bias[0], b2), 1)
        return b1, b2

    def _convolved(self, site: Any, p: Any, q: Tensor, v: Tensor) -> Tensor:
        """Depthwise convolution of v, at the queries' places; prefix rows get 0."""
        v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        groups, half = v.shape[1] * v.shape[3], self.dwc_kernel // 2
        if site.grid is None:
            row = _channels(v) if site.self_attention else interpolate(_channels(v), q.shape[2], mode="linear")
            return conv1d(row, p.dwc_weight, p.dwc_bias, padding=half, groups=groups).unflatten(1, v.shape[1::2]).mT
        prefix, size = site.grid.prefix, (site.grid.h, site.grid.w)
        keys = self._key_grid(site) or size
        image = _channels(v[:, :, prefix:]).unflatten(2, keys)
        if keys != size:
            image = interpolate(image, size, mode="bilinear")
        image = conv2d(image, p.dwc_weight, p.dwc_bias, padding=half, groups=groups)
        return pad(image.flatten(2).unflatten(1, v.shape[1::2]).mT, (0, 0, prefix, 0))

    def limits(self) -> Iterable[Limit]:
        yield from _limits("on a sequence", None)
        yield from _limits("on a grid", (3, 4))


def _limits(where: str, grid: tuple[int, int] | None) -> Iterable[Limit]:
    q, k, v = problem(12)
    flat = v[:, :, :1].expand_as(v)
    yield Limit(
        f"one agent is the mean query, {where}",
        lambda: attention(q, k, v, Agent(1), grid=grid)[:, :, :1],
        lambda: attention(q.mean(2, keepdim=True), k, v, "softmax"),
    )
    yield Limit(f"a constant v comes out, {where}", lambda: attention(q, k, flat, Agent(4), grid=grid), lambda: flat)


def _channels(t: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, H * D, N), heads first."""
    return t.mT.flatten(1, 2)


def _plus(bias: Tensor | None) -> Any:
    added = None if bias is None else table(bias)
    return None if added is None else lambda s, h, i, j: s + added[h, i, j]
