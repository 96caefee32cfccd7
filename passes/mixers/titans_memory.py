"""A memory that is the weights of a small network, which descends a gradient in the forward pass (arXiv 2501.00663)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, pad, relu, rms_norm, silu

from ...compiler.mechanism import Param
from ...compiler.primitives.prefix import prefix
from ...compiler.refusal import Refused
from ...compiler.starts import Start, constant, uniform

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"silu": silu, "gelu": gelu, "relu": relu}  # of q, k, v


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

    @property
    def sizes(self) -> list[int]:
        """How many numbers of the row each tensor of the weights has."""
        return ([self.dim] if self.residual_norm else []) + [a * b for a, b in self.shapes]

    def row(self, gamma: Tensor | None, weights: list[Tensor]) -> Tensor:
        """(..., P): gamma (..., D), if there is one, and the matrices (..., D_in, D_out)."""
        parts = [w.flatten(-2) for w in weights]
        return torch.cat(([] if gamma is None else [gamma]) + parts, -1)

    def parts(self, row: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        parts = row.split(self.sizes, -1)
        gamma, flat = (parts[0], parts[1:]) if self.residual_norm else (None, parts)
        return gamma, [w.unflatten(-1, s) for w, s in zip(flat, self.shapes, strict=True)]

    def __call__(self, row: Tensor, x: Tensor) -> Tensor:
        return self._steps(row, x)[0]

    def descent(self, row: Tensor, k: Tensor, v: Tensor, theta: Tensor) -> Tensor:
        """The gradient of sum_n theta_n mean_d (M(k_n; W) - v_n)^2 at the weights, as a row: k, v (..., L, D)."""
        gamma, weights = self.parts(row)
        found, inner, active, normed, deviation = self._steps(row, k)
        grad = (found - v) * (theta * (2.0 / self.dim)).unsqueeze(-1)
        grad_gamma = None
        if gamma is not None and normed is not None and deviation is not None:
            grad_gamma = (grad * normed).sum(-2)
            grad = grad * (gamma + 1).unsqueeze(-2)
            grad = (grad - grad.mean(-1, keepdim=True) - normed * (grad * normed).mean(-1, keepdim=True)) / deviation
        made: list[Tensor] = []
        for number in reversed(range(len(weights))):
            made.insert(0, active[number].mT @ grad)
            if number:
                grad = torch.ops.aten.gelu_backward(grad @ weights[number].mT, inner[number])
        return self.row(grad_gamma, made)

    def _steps(self, row: Tensor, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor | None, Tensor | None]:
        """M(x), what stands before each matrix without and with its GELU, LN(f) and the deviation it divides by."""
        gamma, weights = self.parts(row)
        inner, active, y = [], list[Tensor](), x
        for number, weight in enumerate(weights):
            inner.append(y)
            active.append(gelu(y) if number else y)
            y = active[-1] @ weight
        if gamma is None:
            return y, inner, active, None, None
        centred = y - y.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()
        normed = centred / deviation
        return x + (gamma + 1).unsqueeze(-2) * normed, inner, active, normed, deviation


@dataclass(frozen=True)
class Past:
    """What is known behind a chunk, rows (B, H, 1, P): where gradients are taken, the weights, every order's S, which
    is None at rest.
    """

    base: Tensor
    weights: Tensor
    speeds: tuple[Tensor | None, ...]

    @property
    def renewed(self) -> Past:
        """The same, with gradients from now on at the weights that stand."""
        return replace(self, base=self.weights)


@dataclass(frozen=True)
class Memory:
    """Chunks of tokens write, every token reads: S_c = eta_c S_{c-1} - g_c, W_c = (1 - alpha_c) W_{c-1} + S_c."""

    net: Net
    heads: int
    reads: int  # tokens of a chunk, for reading and for writing
    writes: int
    batch_size: int | None
    orders: int  # of momentum
    max_lr: float
    qk_rmsnorm: bool
    post_rmsnorm: bool
    max_grad_norm: float | None
    rates: float | None  # at most so much for each tensor of the weights; None: not learned
    activation: str | None

    def params(self, width: int) -> Mapping[str, Param]:
        heads, wide, start = self.heads, self.heads * self.net.dim, uniform(width)
        own = {name: Param((wide, width), start) for name in ("to_queries", "to_keys", "to_values")}
        rows = {"to_adaptive_step": 1, "to_decay_factor": 1, "to_momentum": self.orders}
        rows["to_layer_modulation"] = 0 if self.rates is None else len(self.net.sizes)
        for name, each in rows.items():
            if each:
                own |= {name: Param((heads * each, width), start), f"{name}_bias": Param((heads * each,), start)}
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

    def start(self, p: Any, batch: int) -> Past:
        """W_0, at rest."""
        gamma = p.init_norm_gamma if self.net.residual_norm else None
        row = self.net.row(gamma, [getattr(p, f"init_model_weights_{n}") for n in range(self.net.depth)])
        row = row[None, :, None].expand(batch, -1, -1, -1)
        return Past(row, row, (None,) * self.orders)

    def written(
        self, p: Any, x: Tensor, past: Past, mask: Tensor | None = None, chunks: int = 0
    ) -> tuple[Tensor, Past]:
        """The weights before x and behind each of its chunks, the last of which may be ragged, (B, H, 1 + chunks, P);
        `chunks` came before.

        mask (B, N): tokens that write nothing; they count in what is said of their chunk.
        """
        size, found = self.writes, list[Tensor]()
        x = rms_norm(x, x.shape[2:], p.store_norm)
        count = (x.shape[1] + size - 1) // size
        x = pad(x, (0, 0, 0, count * size - x.shape[1]))
        k, v = (self._heads(self._active(linear(x, w))) for w in (p.to_keys, p.to_values))
        if self.qk_rmsnorm:
            k = rms_norm(k, k.shape[3:]) * (p.k_norm[:, None] + 1)
        theta = torch.sigmoid(linear(x, p.to_adaptive_step, p.to_adaptive_step_bias)).mT * self.max_lr  # (B, H, N)
        if mask is not None:
            theta = theta * pad(mask, (0, theta.shape[2] - mask.shape[1]))[:, None]
        k, v, theta = (t.unflatten(2, (-1, size)) for t in (k, v, theta))
        told = partial(self._told, p, x.unflatten(1, (-1, size)).mean(2))
        keep = 1 - told("to_decay_factor")
        etas = told("to_momentum") if self.orders else None
        rates = None if self.rates is None else self.rates * told("to_layer_modulation")
        for here in self._batches(count, chunks):
            pushed = self.net.descent(past.base, k[:, :, here], v[:, :, here], -theta[:, :, here])
            pushed = self._tempered(pushed, None if rates is None else rates[:, :, here])
            speeds = list[Tensor | None]()
            for order, speed in enumerate(past.speeds):
                assert etas is not None
                eta = etas[:, :, here, order : order + 1]
                pushed = prefix("affine", eta, pushed, state=None if speed is None else (speed,))
                speeds.append(pushed[:, :, -1:])
            rows = prefix("affine", pad(keep[:, :, here], (0, 0, 1, 0)), torch.cat((past.weights, pushed), 2))
            found.append(rows[:, :, 1:] if found else rows)
            past = Past(past.base, rows[:, :, -1:], tuple(speeds))
            if self.batch_size is not None and (chunks + here.stop) * size % self.batch_size == 0:
                past = past.renewed
        return (found[0] if len(found) == 1 else torch.cat(found, 2)), past

    def _told(self, p: Any, mean: Tensor, name: str) -> Tensor:
        """What a chunk's mean says to each head, within 0 and 1: (B, H, chunks, each)."""
        said = torch.sigmoid(linear(mean, getattr(p, name), getattr(p, f"{name}_bias")))
        return said.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def _tempered(self, pushed: Tensor, rates: Tensor | None) -> Tensor:
        """Each tensor's step drawn to a norm below max_grad_norm, m/2 (1 + tanh(norm / (m/2))), and times its rate."""
        if rates is None and self.max_grad_norm is None:
            return pushed
        parts = list(pushed.split(self.net.sizes, -1))
        for number, part in enumerate(parts):
            if self.max_grad_norm is not None:
                half, square = self.max_grad_norm / 2, part.square().sum(-1, keepdim=True)
                norm = torch.where(square > 0, square, 1.0).sqrt()
                parts[number] = part * (half * (1 + torch.tanh(norm / half)) / norm)
            if rates is not None:
                parts[number] = parts[number] * rates[..., number : number + 1]
        return torch.cat(parts, -1)

    def _batches(self, count: Any, before: int) -> list[slice]:
        """Chunks whose gradients are taken at the same weights."""
        if self.batch_size is None:
            return [slice(0, count)]
        if not isinstance(count, int):
            raise Refused(f"{count} chunks, an open number", where="titans batch_size", fits="a known length")
        step = self.batch_size // self.writes
        edges = [0, *range(step - before % step, count, step), count]
        return [slice(first, last) for first, last in pairwise(edges)]

    def read(self, p: Any, x: Tensor, weights: Tensor) -> Tensor:
        """Token n by the weights number (n + 1) // reads of (B, H, chunks + 1, P), before the first chunk on."""
        size, batch, tokens = self.reads, x.shape[0], x.shape[1]
        count = tokens // size + 1
        normed = rms_norm(x, x.shape[2:], p.retrieve_norm)
        q = self._heads(self._active(linear(normed, p.to_queries)))
        if self.qk_rmsnorm:
            q = rms_norm(q, q.shape[3:]) * (p.q_norm[:, None] + 1)
        q = pad(q, (0, 0, 1, count * size - tokens - 1)).unflatten(2, (-1, size))
        r = self.net(weights[:, :, :count], q).flatten(2, 3)[:, :, 1 : tokens + 1]
        if self.post_rmsnorm:
            r = rms_norm(r, r.shape[3:]) * (p.post_norm[:, None] + 1)
        if self.heads > 1:
            r = r * torch.sigmoid(linear(normed, p.retrieve_gate)).mT[..., None]
            return linear(r.transpose(1, 2).flatten(2), p.combine_heads)
        return r.reshape(batch, tokens, -1)

    def __call__(self, p: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The whole sequence is written, then read."""
        past = self.start(p, x.shape[0])
        return self.read(p, x, self.written(p, x, past, mask)[0])

    def _active(self, t: Tensor) -> Tensor:
        return t if self.activation is None else ACTIVATIONS[self.activation](t)

    def _heads(self, t: Tensor) -> Tensor:
        return t.unflatten(2, (self.heads, -1)).transpose(1, 2)


def _xavier(sizes: int) -> Start:
    """Uniform within sqrt(6 / (rows + columns))."""
    bound = math.sqrt(6 / sizes)
    return lambda t: t.uniform_(-bound, bound)
