"""RAT: a gated recurrence inside chunks, softmax over the chunks' last states and a row's own (arXiv 2507.04416)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ...compiler.functional import attention
from ...compiler.mechanism import Limit, Mechanism, Param, register
from ...compiler.primitives.attend import attend
from ...compiler.primitives.merge import merge
from ...compiler.primitives.prefix import prefix
from ...compiler.primitives.rows import as_type, repeat_heads, widened
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.site import Site
from ...compiler.starts import constant

State = Mapping[str, Tensor]


@register("rat")
@dataclass(frozen=True)
class RAT(Mechanism):
    """k~_t = f_t k~_{t-1} + (1 - f_t) k_t, v~ alike, anew in every chunk; then softmax over earlier chunks and itself.

    f = sigmoid(g + gate_bias) per channel. Row n sees the pairs (k~, v~) at the last token of every chunk before its
    own, and its own running pair: n // chunk_size + 1 of them; its output is multiplied by sigmoid(z). chunk_size 1 is
    softmax attention over (1 - f) k, (1 - f) v, chunk_size >= N a gated recurrence that asks no query.

    >>> q, k, v = problem(6)
    >>> ports, shut = {"g": torch.zeros_like(v), "z": torch.full_like(v, 50.0)}, {"gate_bias": torch.full((32,), -50.0)}
    >>> o = attention(q, k, v, "rat", causal=True, chunk_size=6, ports=ports, params=shut)
    >>> torch.allclose(o, v, atol=1e-6)  # one chunk, and nothing is carried on
    True

    Ports g and z (B, H, N, D) are the paper's projections; without them g_proj, z_proj (H * D, C) and z_bias make them
    from x. gate_bias starts at -6 and z_bias at 4, which carries little on and lets all through: softmax over every
    chunk_size-th key, the closest there is (from scratch gate_bias is log u, u uniform in 1 .. chunk_size - 1).
    q and k may have fewer heads than v, the paper's ngroups, which q itself says here: head h has those of group h %
    ngroups. Where k and v alone have fewer, as in a llama, each serves the run of heads that it served.
    rope_base: q and k~ are rotated by the number of their chunk; the site's own rotation is taken off where it is
    known. 0: no rotation here.
    """

    chunk_size: int = 16
    ngroups: int = 2
    rope_base: float = 10000.0

    part = "core"
    kind = "needs recovery"
    honours = frozenset[str]()
    paper = "arXiv 2507.04416"
    heads_alike = False  # gates are made of x, which has no heads
    tries = ({"chunk_size": 4}, {"chunk_size": 1, "rope_base": 0.0})

    def __post_init__(self) -> None:
        if self.chunk_size < 1 or self.ngroups < 1 or self.rope_base < 0:
            found = f"chunk_size={self.chunk_size}, ngroups={self.ngroups}, rope_base={self.rope_base}"
            raise Refused(found, where="rat", fits="numbers from 1 on, rope_base from 0 on")

    def fits(self, site: Site) -> str | None:
        if site.pattern != "causal-self":
            return f"rat carries a recurrence on, it is causal-self; this site is {site.pattern}"
        if site.dim != site.v_dim:
            return f"rat has one gate for keys and values, here they have {site.dim} and {site.v_dim} channels"
        if self.rope_base and site.dim % 2:
            return f"rat rotates pairs of channels, this site has {site.dim}: rope_base=0"
        if not (site.width or {"g", "z"} <= set(site.ports)):
            return "rat asks for ports g and z, or for x and its width, which are not known here"
        return None

    def wanted_ports(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return ("q", "k", "v"), ("x", "g", "z", "q_nope", "k_nope")

    def params(self, site: Site) -> Mapping[str, Param]:
        channels = site.heads * site.dim
        own = {"gate_bias": Param((channels,), constant(-6.0))}
        if "g" not in site.ports:
            own["g_proj"] = Param((channels, site.width))
        if "z" not in site.ports:
            own |= {"z_proj": Param((channels, site.width)), "z_bias": Param((channels,), constant(4.0))}
        return own

    def forward(
        self,
        site: Any,
        p: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor | None = None,
        g: Tensor | None = None,
        z: Tensor | None = None,
        q_nope: Tensor | None = None,
        k_nope: Tensor | None = None,
    ) -> Tensor:
        narrow = v.dtype
        forget, opened = self._gates(site, p, x, g, z)
        q, k, v = self._rows(site, q, k, v, q_nope, k_nope)
        count = torch.arange(k.shape[2], device=k.device)
        chunk = torch.div(count, self.chunk_size, rounding_mode="floor")
        q, own_k, own_v, _ = self._running(q, k, v, forget, chunk, None)
        size = self.chunk_size
        # one end more than there are chunks: a size that is never 1, so that a captured graph is for any length
        ends = torch.arange((k.shape[2] + size - 1) // size + 1, device=k.device) * size + size - 1
        ends = ends.clamp(max=k.shape[2] - 1)
        before = own_k.index_select(2, ends), own_v.index_select(2, ends)
        return as_type(self._merged(site, q, own_k, own_v, before, 0) * opened, narrow)

    def _gates(self, site: Any, p: Any, x: Tensor | None, g: Tensor | None, z: Tensor | None) -> tuple[Tensor, Tensor]:
        """f and the share of the output that is let through."""
        opened, forget = _gate(z, x, p, "z", site.heads), _gate(g, x, p, "g", site.heads)
        return torch.sigmoid(forget + widened(p.gate_bias).view(site.heads, 1, -1)), torch.sigmoid(opened)

    def _rows(
        self, site: Any, q: Tensor, k: Tensor, v: Tensor, q_nope: Tensor | None, k_nope: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of every head, before their rotation where that is known."""
        if self.rope_base and q_nope is not None and k_nope is not None:
            q, k = q_nope, k_nope
        shared = q.shape[1] < site.heads  # the paper's groups; a model's own grouped keys serve runs of heads
        q, k, v = _tiled(widened(q), site.heads), widened(k), widened(v)
        return q, _tiled(k, site.heads) if shared else repeat_heads(k, q), repeat_heads(v, q)

    def _running(
        self, q: Tensor, k: Tensor, v: Tensor, forget: Tensor, chunk: Tensor, before: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q and k~ rotated, v~, and the last running pair; `before`: that of the row before, 0 in another chunk."""
        mixed = torch.cat((k, v), -1) * torch.cat((1 - forget, 1 - forget), -1)
        state = None if before is None else (before,)
        both = prefix("affine", torch.cat((forget, forget), -1), mixed, reset=chunk, state=state)
        own_k, own_v = both.chunk(2, -1)
        if self.rope_base:
            q, own_k = self._turned(q, chunk), self._turned(own_k, chunk)
        return q, own_k, own_v, both[:, :, -1:]

    def _merged(
        self, site: Any, q: Tensor, own_k: Tensor, own_v: Tensor, ends: tuple[Tensor, Tensor], first: int
    ) -> Tensor:
        """Rows from `first` on over the ends of the chunks before their own, and over their own pairs."""
        own = own_v, site.scale * (q * own_k).sum(-1)
        size = self.chunk_size
        others = attend(q, *ends, scale=site.scale, keep=lambda i, j: j < (i + first) // size, outputs=("o", "lse"))
        return merge([others, own])[0]

    def state(self, site: Any, q: Tensor) -> State:
        none = widened(q).new_zeros((q.shape[0], site.heads, 0, site.dim))
        pair = none.new_zeros((q.shape[0], site.heads, 1, 2 * site.dim))
        return {"k": none, "v": none, "pair": pair, "seen": torch.zeros((), dtype=torch.long)}

    def prefill(
        self,
        site: Any,
        p: Any,
        state: State,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor | None = None,
        g: Tensor | None = None,
        z: Tensor | None = None,
        q_nope: Tensor | None = None,
        k_nope: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """The state is a pair for each chunk that is closed, and the running one."""
        seen, size, narrow = int(state["seen"]), self.chunk_size, v.dtype
        forget, opened = self._gates(site, p, x, g, z)
        q, k, v = self._rows(site, q, k, v, q_nope, k_nope)
        place = torch.arange(seen, seen + k.shape[2], device=k.device)
        before = state["pair"] if seen % size else torch.zeros_like(state["pair"])
        q, own_k, own_v, pair = self._running(q, k, v, forget, place // size, before)
        closed = (place % size == size - 1).nonzero()[:, 0]
        keys, values = (torch.cat((state[n], t.index_select(2, closed)), 2) for n, t in (("k", own_k), ("v", own_v)))
        o = self._merged(site, q, own_k, own_v, (keys, values), seen) if keys.shape[2] else own_v
        after = {"k": keys, "v": values, "pair": pair, "seen": torch.tensor(seen + k.shape[2])}
        return as_type(o * opened, narrow), after

    step = prefill

    def _turned(self, t: Tensor, place: Tensor) -> Tensor:
        """Rotated in halves by the number of the chunk."""
        half = t.shape[3] // 2
        rates = torch.arange(half, device=t.device, dtype=t.dtype).mul(-math.log(self.rope_base) / half).exp()
        angles = place[:, None].to(t.dtype) * rates
        first, second = t[..., :half], t[..., half:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(8)
        far = {"gate_bias": torch.full((32,), -60.0)}
        through = {"g": torch.zeros_like(v), "z": torch.full_like(v, 60.0)}

        def rat(size: int, own: Mapping[str, Tensor] = far, **other: Tensor) -> Tensor:
            which = RAT(chunk_size=size, rope_base=0.0)
            return attention(other.get("q", q), k, v, which, causal=True, ports=through, params=own)

        yield Limit("chunks of one token are softmax", lambda: rat(1),
                    lambda: attention(q, k, v, "softmax", causal=True))  # fmt: skip
        yield Limit("one chunk asks no query", lambda: rat(8, {"gate_bias": torch.zeros(32)}),
                    lambda: rat(8, {"gate_bias": torch.zeros(32)}, q=k))  # fmt: skip
        yield Limit("nothing gets in where all is kept", lambda: rat(4, {"gate_bias": torch.full((32,), 60.0)}),
                    lambda: torch.zeros_like(v))  # fmt: skip


def _tiled(t: Tensor, heads: int) -> Tensor:
    """Groups of the paper's q and k in turn: head h has those of group h % G."""
    return t.repeat(1, heads // t.shape[1], 1, 1) if t.shape[1] < heads else t


def _gate(given: Tensor | None, x: Tensor | None, p: Any, name: str, heads: int) -> Tensor:
    if given is not None:
        return widened(given)
    if x is None:
        raise Refused(f"neither {name} nor x", where="rat", fits=f"the port {name} or x")
    weight, bias = (p.z_proj, widened(p.z_bias)) if name == "z" else (p.g_proj, None)
    return linear(widened(x), widened(weight), bias).unflatten(2, (heads, -1)).transpose(1, 2)
