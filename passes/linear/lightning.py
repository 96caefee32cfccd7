"""Lightning attention: keys and values summed into a state that decays by one factor per head (arXiv 2405.17381)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, rms_norm, silu

from ...compiler.functional import attention
from ...compiler.mechanism import Limit, Mechanism, Param, register
from ...compiler.primitives.rows import as_type, repeat_heads, widened
from ...compiler.primitives.scan import scan
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.site import Site
from ...compiler.starts import constant, normal

CHOICES: Mapping[str, tuple[str, ...]] = {
    "act": ("none", "silu_qk", "silu_qkv"),
    "norm": ("none", "layernorm", "rmsnorm", "simple_rmsnorm"),
    "gate": ("none", "sigmoid", "linear"),
    "slope_rule": ("tnl", "minimax"),
}


@register("lightning")
@dataclass(frozen=True)
class Lightning(Mechanism):
    """o_n = sum_{m<=n} exp(-slope_h (n - m)) (q_n . k_m) v_m, then a norm over all heads' outputs, times a gate.

    >>> q, k, v = problem(6)
    >>> slopes = torch.tensor([0.5, 0.1, 0.02, 0.0])
    >>> far = (torch.arange(6)[:, None] - torch.arange(6)).clamp(min=0)
    >>> plain = ((q @ k.mT) * torch.exp(-slopes[:, None, None] * far)).tril() @ v
    >>> torch.allclose(attention(q, k, v, "lightning", causal=True, params={"slopes": slopes}), plain, atol=1e-5)
    True

    Without knobs it is the bare op: the site's scale is not used, there is no denominator and no eps. The dialects:

    TNL             act: silu_qkv, norm: layernorm (weight, bias), gate: sigmoid, gate_rank: the head dimension
    TransNormerLLM  act: silu_qk, norm: simple_rmsnorm, gate: linear, and lrpe in the first layer
    MiniMax         act: silu_qkv, norm: rmsnorm (norm_weight), gate: sigmoid, slope_rule: minimax

    slopes  a buffer (H,): 2^(-8 (h + 1) / H), by ALiBi's rule where H is no power of two (minimax: the same formula).
            With `layers` they shrink to almost none in the last layer; `layer` is the site's own number where left out.
    lrpe    q and k become [x cos(n theta), x sin(n theta)], theta learned per head and channel.
    gate    times sigmoid(u) or u: u is the port `gate` (B, H, N, E), else a projection of x that starts near 1.
    block   what other implementations cut the sequence into; the answer is the same for all, `scan` chooses its own.
    norm_eps  1e-5 for layernorm and 1e-6 for the others where left out.

    A padded position has no value; it still counts as a step of the decay. Ids in the port `documents` ((N,) or (B, N))
    start the state anew where they change.
    """

    act: str = "none"
    norm: str = "none"
    gate: str = "none"
    gate_rank: int = 0
    decay: bool = True
    lrpe: bool = False
    slope_rule: str = "tnl"
    layer: int | None = None
    layers: int = 0
    block: int = 64
    norm_eps: float | None = None

    part = "core"
    kind = "needs recovery"
    honours = {"padding"}
    least = {"block": 1, "gate_rank": 0, "layer": 0, "layers": 0}
    paper = "arXiv 2405.17381"
    heads_apart = False  # the norm goes over all heads
    tries = (
        {},
        {"act": "silu_qkv", "norm": "layernorm", "gate": "sigmoid"},
        {"act": "silu_qk", "norm": "simple_rmsnorm", "gate": "linear", "lrpe": True},
        {"norm": "rmsnorm", "slope_rule": "minimax", "layer": 1, "layers": 4},
    )

    def __post_init__(self) -> None:
        for knob, known in CHOICES.items():
            if getattr(self, knob) not in known:
                raise Refused(f"{knob}={getattr(self, knob)!r}", where="lightning", fits=f"one of {', '.join(known)}")

    def fits(self, site: Site) -> str | None:
        if site.pattern != "causal-self":
            return f"lightning keeps a running state, it is causal-self; this site is {site.pattern}"
        if self.gate != "none" and "gate" not in site.ports and not site.width:
            return f"lightning: gate={self.gate!r} asks for port gate, or for x and its width, which are not known here"
        if self.layers and self._layer(site) >= self.layers:
            return f"lightning: layer {self._layer(site)} of layers={self.layers}"
        return None

    def wanted_ports(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        optional = ("key_padding", "positions", "documents")
        return ("q", "k", "v"), (*optional, "gate", "x") if self.gate != "none" else optional

    def _layer(self, site: Any) -> int:
        return int(site.index) if self.layer is None else self.layer

    def buffers(self, site: Site) -> Mapping[str, Param]:
        def rule(slopes: Tensor) -> Any:
            values = torch.tensor(slope_rule(site.heads, alibi=self.slope_rule == "tnl"), dtype=torch.float64)
            if self.layers:
                last = self.layers - 1 + (1e-5 if self.slope_rule == "minimax" else 0.0)
                values = values * (1 - (self._layer(site) / last if last else 0.0) + 1e-5)
            return slopes.copy_(values)

        return {"slopes": Param((site.heads,), rule, torch.float32)} if self.decay else {}

    def params(self, site: Site) -> Mapping[str, Param]:
        heads, all_heads, own = site.heads, site.heads * site.v_dim, {}
        if self.lrpe:
            whole = heads * site.dim
            start = torch.arange(whole, dtype=torch.float64).mul(-2 * math.log(10000) / whole).exp()
            own["lrpe_theta"] = Param((heads, site.dim), lambda t: t.copy_(start.view(t.shape)))
        if self.norm == "layernorm":
            own |= {"weight": Param((all_heads,), constant(1.0)), "bias": Param((all_heads,))}
        if self.norm == "rmsnorm":
            own["norm_weight"] = Param((all_heads,), constant(1.0))
        if self.gate != "none" and "gate" not in site.ports:
            rank = self.gate_rank
            if rank:
                own |= {"gate_down": Param((rank, site.width), normal(0.02)), "gate_up": Param((all_heads, rank))}
            else:
                own["gate_weight"] = Param((all_heads, site.width))
            own["gate_bias"] = Param((all_heads,), constant(1.0 if self.gate == "linear" else 4.0))
        return own

    def forward(
        self,
        site: Any,
        p: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding: Tensor | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        gate: Tensor | None = None,
        x: Tensor | None = None,
    ) -> Tensor:
        narrow = q.dtype
        q, k, v = widened(q), widened(k), widened(v)
        if self.act == "silu_qkv":
            v = silu(v)
        if key_padding is not None:
            v = v * key_padding[:, None, :, None]
        act = None if self.act == "none" else lambda x: x * torch.sigmoid(x)
        if self.lrpe:
            angles = _positions(site, k, positions)[..., None] * widened(p.lrpe_theta)[:, None]  # (B|1, H, N, D)
            turning = [silu(t) if act else t for t in (q, repeat_heads(k, q))]
            q, k = (_turned(t, angles) for t in turning)
            act, v = None, repeat_heads(v, q)
        log_decay = -p.slopes if self.decay else None
        o: Tensor = scan(q, k, v, feature=act, log_decay=log_decay, reset=documents)
        if self.norm == self.gate == "none":
            return as_type(o, narrow)
        rows = self._normed(p, o.transpose(1, 2).flatten(2))  # (B, N, H * E)
        if self.gate != "none":
            u = self._gate(p, gate, x)
            rows = rows * (torch.sigmoid(u) if self.gate == "sigmoid" else u)
        return as_type(rows.unflatten(2, (site.heads, site.v_dim)).transpose(1, 2), narrow)

    def _normed(self, p: Any, rows: Tensor) -> Tensor:
        eps = self.norm_eps
        if self.norm == "layernorm":
            return layer_norm(rows, rows.shape[2:], widened(p.weight), widened(p.bias), 1e-5 if eps is None else eps)
        if self.norm == "none":
            return rows
        weight = widened(p.norm_weight) if self.norm == "rmsnorm" else None
        return rms_norm(rows, rows.shape[2:], weight, 1e-6 if eps is None else eps)

    def _gate(self, p: Any, gate: Tensor | None, x: Tensor | None) -> Tensor:
        if gate is not None:
            return widened(gate).transpose(1, 2).flatten(2)
        if x is None:
            raise Refused(f"gate={self.gate!r} without x", where="lightning", fits="the port x or gate")
        u, bias = widened(x), widened(p.gate_bias)
        if self.gate_rank:
            return linear(linear(u, widened(p.gate_down)), widened(p.gate_up), bias)
        return linear(u, widened(p.gate_weight), bias)

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(9)

        def causal(**how: Any) -> Tensor:
            return attention(q, k, v, "lightning", causal=True, **how)

        yield Limit("no decay is (q kᵀ).tril() v", lambda: causal(decay=False), lambda: (q @ k.mT).tril() @ v)
        yield Limit("an endless slope leaves the row itself", lambda: causal(params={"slopes": torch.full((4,), 1e4)}),
                    lambda: (q * k).sum(-1, keepdim=True) * v)  # fmt: skip
        yield Limit("frequencies of 0 are no lrpe",
                    lambda: causal(lrpe=True, params={"lrpe_theta": torch.zeros(4, 8)}), causal)  # fmt: skip
        yield Limit("a shift of all positions changes nothing",
                    lambda: causal(lrpe=True, ports={"positions": torch.arange(9) + 5}),
                    lambda: causal(lrpe=True))  # fmt: skip
        yield Limit("the slopes of four heads", lambda: causal(), lambda: causal(params={"slopes": _FOUR}))


_FOUR = torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256])


def slope_rule(heads: int, *, alibi: bool = True) -> list[float]:
    """2^(-8 (h + 1) / H); by ALiBi's rule the heads beyond a power of two P take every other slope of 2P heads."""
    near = 1 << (heads.bit_length() - 1)
    if near == heads or not alibi:
        return [2.0 ** (-8 * (h + 1) / heads) for h in range(heads)]
    return slope_rule(near) + slope_rule(2 * near)[0 : 2 * (heads - near) : 2]


def _turned(rows: Tensor, angles: Tensor) -> Tensor:
    """[x cos, x sin]; where there are fewer rows than angles, queries behind a past, they are the last."""
    own = angles[:, :, angles.shape[2] - rows.shape[2] :]
    return torch.cat((rows * own.cos(), rows * own.sin()), -1)


def _positions(site: Any, k: Tensor, given: Tensor | None) -> Tensor:
    """(B|1, 1, N): those given, those that stand at the site under a cache, or counted."""
    if given is None and site.spec.k_positions:
        given = site.tables[int(site.spec.k_positions[1:])]
    if given is None:
        given = torch.arange(k.shape[2], device=k.device)
    return (given if given.ndim == 2 else given[None]).to(k.dtype)[:, None]
