"""A memory that is the weights of a small network, which descends a gradient in the forward pass (arXiv 2501.00663)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, pad, rms_norm

from ...compiler.mechanism import Param
from ...compiler.primitives.prefix import prefix
from ...compiler.refusal import Refused
from ...compiler.starts import Start, constant, uniform


@dataclass(frozen=True)
class Net:
    """M(x; W) = x + (gamma + 1) LN(f(x)), or f(x), `depth` matrices with GELU between them; W is one row."""

    dim: int
    depth: int
    expansion: float
    residual_norm: bool
    eps: float

    @property
    def shapes(self) -> list[tuple[int, int]]:
        inner = int(self.dim * self.expansion)
        sizes = [self.dim, *[inner] * (self.depth - 1), self.dim]
        return list(pairwise(sizes))

    def row(self, gamma: Tensor | None, weights: list[Tensor]) -> Tensor:
        """(..., P): gamma (..., D), if there is one, and the matrices (..., D_in, D_out)."""
        parts = [w.flatten(-2) for w in weights]
        return torch.cat(([] if gamma is None else [gamma]) + parts, -1)

    def parts(self, row: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        first = self.dim if self.residual_norm else 0
        flat = row[..., first:].split([a * b for a, b in self.shapes], -1)
        return row[..., :first] if first else None, [w.unflatten(-1, s) for w, s in zip(flat, self.shapes, strict=True)]

    def __call__(self, row: Tensor, x: Tensor) -> Tensor:
        return self._steps(row, x)[0]

    def descent(self, row: Tensor, k: Tensor, v: Tensor, theta: Tensor) -> Tensor:
        """The gradient of sum_n theta_n mean_d (M(k_n; W) - v_n)^2 at the weights, as a row: k, v (..., L, D)."""
        gamma, weights = self.parts(row)
        found, inner, normed, deviation = self._steps(row, k)
        grad = (found - v) * (theta * (2.0 / self.dim)).unsqueeze(-1)
        grad_gamma = None
        if gamma is not None and normed is not None and deviation is not None:
            grad_gamma = (grad * normed).sum(-2)
            grad = grad * (gamma + 1).unsqueeze(-2)
            grad = (grad - grad.mean(-1, keepdim=True) - normed * (grad * normed).mean(-1, keepdim=True)) / deviation
        made: list[Tensor] = []
        for number in reversed(range(len(weights))):
            before = inner[number]
            made.insert(0, (gelu(before) if number else before).mT @ grad)
            if number:
                grad = (grad @ weights[number].mT) * _slope(before)
        return self.row(grad_gamma, made)

    def _steps(self, row: Tensor, x: Tensor) -> tuple[Tensor, list[Tensor], Tensor | None, Tensor | None]:
        """M(x), what stands before each matrix (and its GELU), LN(f) and the deviation it divides by."""
        gamma, weights = self.parts(row)
        inner, y = [], x
        for number, weight in enumerate(weights):
            inner.append(y)
            y = (gelu(y) if number else y) @ weight
        if gamma is None:
            return y, inner, None, None
        centred = y - y.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()
        normed = centred / deviation
        return x + (gamma + 1).unsqueeze(-2) * normed, inner, normed, deviation


@dataclass(frozen=True)
class Memory:
    """Chunks of tokens write, every token reads: S_c = eta_c S_{c-1} - g_c, W_c = (1 - alpha_c) W_{c-1} + S_c."""

    net: Net
    heads: int
    chunk_size: int
    batch_size: int | None
    momentum: bool
    max_lr: float
    qk_rmsnorm: bool
    post_rmsnorm: bool

    def params(self, width: int) -> Mapping[str, Param]:
        heads, wide, start = self.heads, self.heads * self.net.dim, uniform(width)
        own = {name: Param((wide, width), start) for name in ("to_queries", "to_keys", "to_values")}
        for name in ("to_adaptive_step", "to_decay_factor", *(("to_momentum",) if self.momentum else ())):
            own |= {name: Param((heads, width), start), f"{name}_bias": Param((heads,), start)}
        own |= {name: Param((width,), constant(1.0)) for name in ("retrieve_norm", "store_norm")}
        if heads > 1:
            own |= {"retrieve_gate": Param((heads, width), start), "combine_heads": Param((width, wide), uniform(wide))}
        for name in (("q_norm", "k_norm") if self.qk_rmsnorm else ()) + (("post_norm",) if self.post_rmsnorm else ()):
            own[name] = Param((heads, self.net.dim))
        if self.net.residual_norm:
            own["init_norm_gamma"] = Param((heads, self.net.dim))
        for number, (a, b) in enumerate(self.net.shapes):
            own[f"init_model_weights_{number}"] = Param((heads, a, b), _xavier(a + b))
        return own

    def start(self, p: Any, batch: int) -> Tensor:
        """W_0 as a row (B, H, 1, P)."""
        gamma = p.init_norm_gamma if self.net.residual_norm else None
        row = self.net.row(gamma, [getattr(p, f"init_model_weights_{n}") for n in range(self.net.depth)])
        return row[None, :, None].expand(batch, -1, -1, -1)

    def written(self, p: Any, x: Tensor, before: Tensor, speed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The weights behind each chunk of x, the last of which may be ragged, (B, H, chunks, P); and the last S."""
        size, base, found = self.chunk_size, before, []
        x = rms_norm(x, x.shape[2:], p.store_norm)
        count = (x.shape[1] + size - 1) // size
        x = pad(x, (0, 0, 0, count * size - x.shape[1]))
        k, v = (self._heads(linear(x, w)) for w in (p.to_keys, p.to_values))
        if self.qk_rmsnorm:
            k = rms_norm(k, k.shape[3:]) * (p.k_norm[:, None] + 1)
        theta = torch.sigmoid(linear(x, p.to_adaptive_step, p.to_adaptive_step_bias)).mT * self.max_lr  # (B, H, N)
        k, v, theta = (t.unflatten(2, (-1, size)) for t in (k, v, theta))
        mean = x.unflatten(1, (-1, size)).mean(2)
        keep = 1 - torch.sigmoid(linear(mean, p.to_decay_factor, p.to_decay_factor_bias)).mT[..., None]
        eta = torch.sigmoid(linear(mean, p.to_momentum, p.to_momentum_bias)).mT[..., None] if self.momentum else None
        speed = torch.zeros_like(before) if speed is None else speed
        for here in self._batches(count):
            pushed = -self.net.descent(base, k[:, :, here], v[:, :, here], theta[:, :, here])
            if eta is not None:
                pushed = prefix("affine", eta[:, :, here].expand_as(pushed), pushed, state=(speed,))
                speed = pushed[:, :, -1:]
            rows = prefix("affine", keep[:, :, here].expand_as(pushed), pushed, state=(base,))
            found.append(rows)
            base = rows[:, :, -1:]
        return torch.cat(found, 2), speed

    def _batches(self, count: Any) -> list[slice]:
        """Chunks whose gradients are taken at the same weights."""
        if self.batch_size is None:
            return [slice(None)]
        if not isinstance(count, int):
            raise Refused(f"{count} chunks, an open number", where="titans batch_size", fits="a known length")
        step = self.batch_size // self.chunk_size
        return [slice(first, first + step) for first in range(0, count, step)]

    def read(self, p: Any, x: Tensor, weights: Tensor) -> Tensor:
        """Token n by the weights number (n + 1) // chunk_size of (B, H, chunks + 1, P), before the first chunk on."""
        size, batch, tokens = self.chunk_size, x.shape[0], x.shape[1]
        normed = rms_norm(x, x.shape[2:], p.retrieve_norm)
        q = self._heads(linear(normed, p.to_queries))
        if self.qk_rmsnorm:
            q = rms_norm(q, q.shape[3:]) * (p.q_norm[:, None] + 1)
        q = pad(q, (0, 0, 1, weights.shape[2] * size - tokens - 1)).unflatten(2, (-1, size))
        r = self.net(weights, q).flatten(2, 3)[:, :, 1 : tokens + 1]
        if self.post_rmsnorm:
            r = rms_norm(r, r.shape[3:]) * (p.post_norm[:, None] + 1)
        if self.heads > 1:
            r = r * torch.sigmoid(linear(normed, p.retrieve_gate)).mT[..., None]
            return linear(r.transpose(1, 2).flatten(2), p.combine_heads)
        return r.reshape(batch, tokens, -1)

    def __call__(self, p: Any, x: Tensor) -> Tensor:
        """The whole sequence is written, then read."""
        start = self.start(p, x.shape[0])
        return self.read(p, x, torch.cat((start, self.written(p, x, start)[0]), 2))

    def _heads(self, t: Tensor) -> Tensor:
        return t.unflatten(2, (self.heads, -1)).transpose(1, 2)


def _xavier(sizes: int) -> Start:
    """Uniform within sqrt(6 / (rows + columns))."""
    bound = math.sqrt(6 / sizes)
    return lambda t: t.uniform_(-bound, bound)


def _slope(x: Tensor) -> Tensor:
    """The derivative of GELU."""
    return 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * torch.exp(-0.5 * x * x) * (2 * math.pi) ** -0.5
