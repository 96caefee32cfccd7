"""Titans: a memory learned at test time, alone or as context, gate or layer of attention (arXiv 2501.00663)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear, pad, rms_norm

from ...compiler.layers import module
from ...compiler.mechanism import Limit, Mechanism, Param, register
from ...compiler.primitives.attend import attend
from ...compiler.primitives.rows import as_type, widened
from ...compiler.problem import hidden
from ...compiler.refusal import Refused, nearest
from ...compiler.site import Site
from ...compiler.starts import constant, normal, uniform
from .titans_memory import ACTIVATIONS, Memory, Net, Past

State = Mapping[str, Tensor]


@register("titans")
@dataclass(frozen=True)
class Titans(Mechanism):
    """memory: r_n = M(q_n; W_c), c = (n + 1) // chunk_size - 1, the weights behind the last whole chunk (n's own too).

    W_c = (1 - alpha_c) W_{c-1} + S_c, S_c = eta_c S_{c-1} - g_c; g_c is the gradient of the chunk's
    sum_n theta_n mean_d (M(k_n) - v_n)^2 at the first weights, or with batch_size at those behind the last batch_size
    tokens. M is `memory_depth` matrices with GELU between them (expansion_factor wide), a LayerNorm (gamma + 1) and x.

    mac  for every segment s: y = causal attention over [persistent | r(s) | s], r read from the memory of the segments
         before; the memory then learns y; out = y * r(y). The length must be known.
    mag  out = norm(y) * sigmoid(norm(r([persistent | x]))), y attention over persistent tokens and a window of x.
    mal  out = that attention over r([persistent | x]).

    >>> layer = module("titans", dim=8, causal=True, chunk_size=2)
    >>> x = torch.randn(1, 6, 8)
    >>> y, later = layer(x), layer(torch.cat((x[:, :4], -x[:, 4:]), 1))
    >>> torch.equal(y[:, :4], later[:, :4])
    True

    theta = max_lr sigmoid(.) of each token, eta and alpha sigmoid(.) of each chunk's mean. There is no official code:
    the memory is that of a re-implementation, the three layers are the paper's formulas; how the gate is normalised is
    not said there (here: RMS norms and a sigmoid).

    chunk_size       a pair: of reading, of writing. Reading never has the shorter ones: it would look ahead.
    momentum_order   S passes through as many decays of its own, each a row of to_momentum: the second is that of the
                     first's S, and so on; the last is added.
    max_grad_norm    the gradient of each of the memory's tensors has a norm of m/2 (1 + tanh(norm / (m/2))), as in the
                     re-implementation: small ones grow towards m/2. One of 0 stays 0 (there it is no number).
    per_parameter_lr_modulation   and a rate, max_mem_layer_modulation sigmoid(.) of each chunk's mean, one for each
                     tensor: to_layer_modulation (H * tensors, C), gamma before the matrices.
    activation       of queries, keys and values.
    The port store_mask (B, N): where it is false, theta is 0. A Decoder carries the memory from piece to piece: the
    tokens of the open chunk, the weights behind the last one, those that gradients are taken at, and every S.
    """

    variant: Literal["memory", "mac", "mag", "mal"] = "memory"
    chunk_size: int | tuple[int, int] = 1
    heads: int = 1
    dim_head: int | None = None
    batch_size: int | None = None
    memory_depth: int = 2
    expansion_factor: float = 4.0
    momentum: bool = True
    momentum_order: int = 1
    max_lr: float = 1.0
    max_grad_norm: float | None = None
    per_parameter_lr_modulation: bool = False
    max_mem_layer_modulation: float = 1.0
    activation: Literal["silu", "gelu", "relu"] | None = None
    residual_norm: bool = True
    norm_eps: float = 1e-5
    qk_rmsnorm: bool = False
    post_rmsnorm: bool = False
    num_persist: int = 4
    segment: int = 32
    window: int = 32

    part = "region"
    least = {"expansion_factor": 0}
    kind = "needs recovery"
    paper = "arXiv 2501.00663"
    tries = (
        {"expansion_factor": 0.1, "chunk_size": 3, "max_lr": 0.1},
        {"heads": 2, "dim_head": 4, "memory_depth": 1, "residual_norm": False, "qk_rmsnorm": True,
         "post_rmsnorm": True, "momentum": False, "chunk_size": 2},
        {"expansion_factor": 0.1, "chunk_size": (3, 2), "max_lr": 0.1, "momentum_order": 2, "activation": "silu",
         "max_grad_norm": 0.5, "per_parameter_lr_modulation": True},
        *({"variant": variant, "expansion_factor": 0.1, "window": 3, "num_persist": 2, "chunk_size": 4, "max_lr": 0.1}
          for variant in ("mag", "mal")),
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.variant not in ("memory", "mac", "mag", "mal"):
            raise Refused(f"variant={self.variant!r}", where="titans", fits="memory, mac, mag or mal")
        if not isinstance(self.chunk_size, int):
            object.__setattr__(self, "chunk_size", tuple(self.chunk_size))
        reads, writes = self._chunks
        sizes = (writes, self.heads, self.memory_depth, self.segment, self.window, self.momentum_order)
        if min(sizes) < 1 or self.num_persist < 0:
            raise Refused("a size below 1", where="titans", fits="sizes of 1 or more, num_persist of 0 or more")
        if reads < writes:
            found = f"chunk_size={self.chunk_size} reads ahead of what is written"
            raise Refused(found, where="titans", fits="(reading, writing), the first no smaller")
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise Refused(f"activation={self.activation!r}", where="titans", fits=nearest(self.activation, ACTIVATIONS))
        if self.batch_size is not None and (self.batch_size < 1 or self.batch_size % writes):
            found = f"batch_size={self.batch_size}, chunk_size={self.chunk_size}"
            raise Refused(found, where="titans", fits="batch_size a multiple of chunk_size")
        if self.variant == "mac" and any(self.segment % size for size in (reads, writes, self.batch_size or 1)):
            found = f"segment={self.segment}, chunk_size={self.chunk_size}, batch_size={self.batch_size}"
            raise Refused(found, where="titans", fits="segments of whole chunks and batches")

    def fits(self, site: Site) -> str | None:
        if not site.causal:
            return f"titans remembers what came before, this site is {site.pattern}"
        if not site.width:
            return "titans needs the width of x: dim=..."
        if self.heads == 1 and self.dim_head not in (None, site.width):
            return f"dim_head={self.dim_head} with one head, x has {site.width} channels"
        if int((self.dim_head or site.width) * self.expansion_factor) < 1:
            return f"expansion_factor={self.expansion_factor} leaves a memory of {site.width} channels without width"
        return None

    @property
    def _chunks(self) -> tuple[int, int]:
        reads, writes = (self.chunk_size,) * 2 if isinstance(self.chunk_size, int) else self.chunk_size
        return reads, writes

    def _memory(self, width: int) -> Memory:
        net = Net(self.dim_head or width, self.memory_depth, self.expansion_factor, self.residual_norm, self.norm_eps)
        orders = self.momentum_order if self.momentum else 0
        rates = self.max_mem_layer_modulation if self.per_parameter_lr_modulation else None
        return Memory(net, self.heads, *self._chunks, self.batch_size, orders, self.max_lr, self.qk_rmsnorm,
                      self.post_rmsnorm, self.max_grad_norm, rates, self.activation)  # fmt: skip

    def params(self, site: Site) -> Mapping[str, Param]:
        width = site.width
        own = dict(self._memory(width).params(width))
        if self.variant != "memory":
            own |= {name: Param((width, width), uniform(width)) for name in ("w_q", "w_k", "w_v", "w_o")}
            own["persistent"] = Param((self.num_persist, width), normal(0.02))
        if self.variant == "mag":
            own |= {name: Param((width,), constant(1.0)) for name in ("attention_norm", "memory_norm")}
        return own

    def forward(self, site: Any, p: Any, x: Tensor, store_mask: Tensor | None = None) -> Tensor:
        narrow, x, memory = x.dtype, widened(x), self._memory(site.width)
        p = _Wide(p)
        if self.variant == "memory":
            return as_type(memory(p, x, store_mask), narrow)
        if self.variant == "mac":
            return as_type(self._segments(site, p, memory, x, store_mask), narrow)
        front = p.persistent.expand(x.shape[0], -1, -1)
        whole = torch.cat((front, x), 1)
        known = memory(p, whole, None if store_mask is None else pad(store_mask, (self.num_persist, 0), value=True))
        near, few = self.window, self.num_persist
        y = self._attended(site, p, whole if self.variant == "mag" else known, lambda i, j: (i - j < near) | (j < few))
        if self.variant == "mag":
            y = rms_norm(y, y.shape[2:], p.attention_norm)
            y = y * torch.sigmoid(rms_norm(known, known.shape[2:], p.memory_norm))
        return as_type(y[:, self.num_persist :], narrow)

    def state(self, site: Any, x: Tensor) -> State:
        reads, writes = self._chunks
        if self.variant != "memory" or reads != writes:
            found = f"variant={self.variant!r}, chunk_size={self.chunk_size}"
            raise Refused(found, where="titans from piece to piece", fits="one memory, with one chunk_size")
        return {"waiting": x[:, :0], "chunks": torch.zeros((), dtype=torch.long)}

    def prefill(self, site: Any, p: Any, state: State, x: Tensor) -> tuple[Tensor, State]:
        memory, p, size = self._memory(site.width), _Wide(p), self._chunks[1]
        names = [f"speed_{order}" for order in range(memory.orders)]
        past = memory.start(p, x.shape[0])
        if "weights" in state:
            past = Past(state["base"], state["weights"], tuple(state[name] for name in names))
        whole = torch.cat((state["waiting"], x), 1)
        rows, chunks, ready = past.weights, int(state["chunks"]), whole.shape[1] // size
        if ready:
            rows, past = memory.written(p, widened(whole[:, : ready * size]), past, chunks=chunks)
        y = memory.read(p, widened(whole), rows)[:, -x.shape[1] :]
        speeds = (torch.zeros_like(past.weights) if speed is None else speed for speed in past.speeds)
        carried = {"base": past.base, "weights": past.weights, **dict(zip(names, speeds, strict=True))}
        after = {"waiting": whole[:, ready * size :], "chunks": torch.tensor(chunks + ready)}
        return as_type(y, x.dtype), {**after, **carried}

    step = prefill

    def _attended(self, site: Any, p: Any, x: Tensor, keep: Any) -> Tensor:
        q, k, v = (linear(x, w).unflatten(2, (site.heads, -1)).transpose(1, 2) for w in (p.w_q, p.w_k, p.w_v))
        o = attend(q, k, v, causal=True, keep=keep)
        return linear(o.transpose(1, 2).flatten(2), p.w_o)

    def _segments(self, site: Any, p: Any, memory: Memory, x: Tensor, mask: Tensor | None) -> Tensor:
        if not isinstance(x.shape[1], int):
            raise Refused(f"{x.shape[1]} tokens, an open number", where="titans mac", fits="a known length")
        past, found = memory.start(p, x.shape[0]), []
        front = p.persistent.expand(x.shape[0], -1, -1)
        segments = x.split(self.segment, 1)
        masks = [None] * len(segments) if mask is None else mask.split(self.segment, 1)
        for s, stored in zip(segments, masks, strict=True):
            recalled = memory.read(p, s, past.weights.expand(-1, -1, s.shape[1] // memory.reads + 1, -1))
            whole = torch.cat((front, recalled, s), 1)
            few, many = self.num_persist, s.shape[1]  # a token sees what was recalled for it and those before it
            y = self._attended(site, p, whole, lambda i, j, few=few, many=many: (j + many <= i) | (j >= few + many))
            y = y[:, few + many :]
            rows, past = memory.written(p, y, past, stored)
            found.append(y * memory.read(p, y, rows))
            past = past.renewed
        return torch.cat(found, 1)

    def limits(self) -> Iterable[Limit]:
        x = hidden(5, width=8)

        def layer(**own: float) -> Tensor:
            made = module("titans", dim=8, causal=True, memory_depth=1, residual_norm=False, momentum=False)
            with torch.no_grad():
                for name, value in own.items():
                    made.reattend.get_parameter(f"{name}_bias").fill_(value)
                    made.reattend.get_parameter(name).zero_()
                made.reattend.get_parameter("init_model_weights_0").copy_(torch.eye(8))
                made.reattend.get_parameter("to_queries").copy_(torch.eye(8))
            found: Tensor = made(x).detach()
            return found

        plain = rms_norm(x, (8,))
        yield Limit("nothing is written where nothing is learned or lost",
                    lambda: layer(to_adaptive_step=-100.0, to_decay_factor=-100.0), lambda: plain)  # fmt: skip
        yield Limit("what is only lost, decays", lambda: layer(to_adaptive_step=-100.0, to_decay_factor=0.0),
                    lambda: plain * 0.5 ** torch.arange(1, 6)[:, None])  # fmt: skip


class _Wide:
    """The mechanism's tensors in float32 or better."""

    def __init__(self, p: Any) -> None:
        self._p = p

    def __getattr__(self, name: str) -> Tensor:
        return widened(getattr(self._p, name))
