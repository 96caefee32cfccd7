"""Pixel-focused attention: a small window and pooled keys of the whole picture in one softmax (arXiv 2311.17132)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, gelu, layer_norm, linear, normalize, pad, softplus

from ...compiler.functional import attention
from ...compiler.mechanism import Limit, Mechanism, Param, register
from ...compiler.primitives.attend import Segment, attend
from ...compiler.primitives.group import group
from ...compiler.primitives.rows import as_type, repeat_heads, widened
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.site import Grid, Site
from ...compiler.starts import constant, normal, uniform
from ...compiler.symbols import build, table
from .bias_network import bias_of_pooled, bias_of_steps, network
from .grid_windows import no_grid


@register("transnext")
@dataclass(frozen=True)
class TransNeXt(Mechanism):
    """o_i = sum_o (a_io + n(q_i) . T_o + b_o) v_{i+o} + sum_j a_ij v_pool_j, a one softmax over both kinds of keys.

    The logits are q^_i . n(k), with local_bias of the offset o in the window x window tokens around i, or with
    pool_bias(i, j); q^_i = (n(q_i) + query_embed) softplus(temperature) ln(keys that i sees), n(t) = t / |t|.
    T (learn_tokens) and b (learn_bias) weigh the window's values without the keys, behind the softmax.

    >>> q, k, v = problem(6)
    >>> heat = {"temperature": torch.full((4,), 2.0)}
    >>> o = attention(q, k, v, "transnext", grid=(2, 3), sr_ratio=1, params=heat)
    >>> unit = [torch.nn.functional.normalize(t, dim=-1) for t in (q, k)]
    >>> scale = math.log(6) * torch.nn.functional.softplus(heat["temperature"][0])
    >>> torch.allclose(o, attention(*unit, v, "softmax", scale=float(scale)), atol=1e-5)
    True

    sr_ratio r: pooled keys stand on a grid of (h // r, w // r) (fixed_pool_size: that many squared); 1 is the paper's
    last stage, all keys without a window. Their k and v are ports k_pool, v_pool (B, H, P, D), or means of k and v
    (pool kv), or made of x (pool x): kv_weight, kv_bias applied to LN(mean(gelu(sr_weight x + sr_bias))).
    pool_bias is fc2(relu(fc1(.))) of the logarithmic steps between query and key, steps counted in pretrain_grid.
    fc2, query_embed, local_bias, T and b start at 0; the cosine needs training all the same. Prefix tokens see every
    key and are keys of all.
    """

    window: int = 3
    sr_ratio: int = 8
    fixed_pool_size: int | None = None
    pretrain_grid: tuple[int, int] | None = None
    pool: Literal["kv", "x"] = "kv"

    part = "core"
    kind = "needs recovery"
    honours = frozenset[str]()
    least = {"fixed_pool_size": 1}
    paper = "arXiv 2311.17132"
    tries = ({"sr_ratio": 2}, {"fixed_pool_size": 1, "window": 5, "pretrain_grid": (4, 4)}, {"sr_ratio": 1})

    def __post_init__(self) -> None:
        if self.pretrain_grid is not None:
            object.__setattr__(self, "pretrain_grid", tuple(self.pretrain_grid))
        if self.window < 1 or self.window % 2 == 0 or self.sr_ratio < 1 or self.pool not in ("kv", "x"):
            found = f"window={self.window}, sr_ratio={self.sr_ratio}, pool={self.pool!r}"
            raise Refused(found, where="transnext", fits="an odd window, sr_ratio of 1 or more, pool kv or x")

    def fits(self, site: Site) -> str | None:
        if self.pool == "x" and not self._all and not site.width:
            return "transnext with pool='x' needs the width of x, which is not known here"
        return no_grid(site, "transnext")

    def wanted_ports(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return ("q", "k", "v", *(("x",) if self.pool == "x" and not self._all else ())), ("k_pool", "v_pool")

    @property
    def _all(self) -> bool:
        return self.sr_ratio == 1 and self.fixed_pool_size is None

    def pooled(self, grid: Grid) -> tuple[int, int]:
        if self.fixed_pool_size is not None:
            return self.fixed_pool_size, self.fixed_pool_size
        return max(1, grid.h // self.sr_ratio), max(1, grid.w // self.sr_ratio)

    def params(self, site: Site) -> Mapping[str, Param]:
        heads, dim, many = site.heads, site.dim, self.window**2
        own = {
            "temperature": Param((heads,), constant(math.log(math.exp(1 / 0.24) - 1))),
            "query_embed": Param((heads, dim)),
            **network(heads),
        }
        if self._all:
            return own
        own |= {"local_bias": Param((heads, many)), "learn_bias": Param((heads, many))}
        own["learn_tokens"] = Param((heads, dim, many))
        if self.pool == "x":
            width, rows = site.width, site.kv_heads * (dim + site.v_dim)
            own |= {"sr_weight": Param((width, width), normal(width**-0.5)), "sr_bias": Param((width,))}
            own |= {"norm_weight": Param((width,), constant(1.0)), "norm_bias": Param((width,))}
            own |= {"kv_weight": Param((rows, width), uniform(width)), "kv_bias": Param((rows,))}
        return own

    def forward(
        self,
        site: Any,
        p: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor | None = None,
        k_pool: Tensor | None = None,
        v_pool: Tensor | None = None,
    ) -> Tensor:
        narrow, prefix, grid = v.dtype, site.grid.prefix, site.grid
        q, k, v = widened(q), widened(repeat_heads(k, q)), widened(repeat_heads(v, q))
        unit_q, unit_k = normalize(q, dim=-1), normalize(k, dim=-1)
        warm = (unit_q + widened(p.query_embed)[:, None]) * softplus(widened(p.temperature))[:, None, None]
        if self._all:
            return as_type(self._everywhere(p, grid, warm * math.log(q.shape[2]), unit_k, v), narrow)
        if k_pool is None or v_pool is None:
            k_pool, v_pool = self._pool(site, p, k, v, x)
        few_k = torch.cat((unit_k[:, :, :prefix], normalize(widened(repeat_heads(k_pool, q)), dim=-1)), 2)
        few_v = torch.cat((v[:, :, :prefix], widened(repeat_heads(v_pool, q))), 2)
        near = _window(grid, self.window, q.device)  # (h * w, L): row numbers on the grid, -1 beyond it
        warm_here = warm[:, :, prefix:] * ((near >= 0).sum(1) + few_k.shape[2]).to(q.dtype).log()[:, None]
        o = self._near_and_pooled(p, grid, warm_here, unit_k[:, :, prefix:], v[:, :, prefix:], few_k, few_v, near)
        learned = unit_q[:, :, prefix:] @ widened(p.learn_tokens) + widened(p.learn_bias)[:, None]  # (B, H, h * w, L)
        o = o + (learned.unsqueeze(-2) @ group(v[:, :, prefix:], near)[0]).squeeze(-2)
        if prefix:
            o = torch.cat((attend(warm[:, :, :prefix] * math.log(q.shape[2]), unit_k, v, scale=1.0), o), 2)
        return as_type(o, narrow)

    def _everywhere(self, p: Any, grid: Grid, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias, w, prefix = table(bias_of_steps(p, grid, self.pretrain_grid)), grid.w, grid.prefix

        def score(s: Any, h: Any, i: Any, j: Any) -> Any:
            i, j = i - prefix, j - prefix
            added = bias[h, i // w - j // w + grid.h - 1, i % w - j % w + w - 1]
            return s + (build("where", (i >= 0) & (j >= 0), added, 0.0) if prefix else added)

        o: Tensor = attend(q, k, v, scale=1.0, score=score)
        return o

    def _near_and_pooled(
        self, p: Any, grid: Grid, q: Tensor, k: Tensor, v: Tensor, few_k: Tensor, few_v: Tensor, near: Tensor
    ) -> Tensor:
        """One softmax over the window's keys and the few that everybody sees."""
        half, size, w = self.window // 2, self.window, grid.w
        known = bias_of_pooled(p, grid, self.pooled(grid), self.pretrain_grid)
        local, far = table(widened(p.local_bias)), table(pad(known, (grid.prefix, 0)))

        def here(s: Any, h: Any, i: Any, j: Any) -> Any:
            return s + local[h, (j // w - i // w + half) * size + j % w - i % w + half]

        pooled = Segment(few_k, few_v, score=lambda s, h, i, j: s + far[h, i, j])
        o: Tensor = attend(q, k, v, scale=1.0, score=here, rows=near[None, None], segments=[pooled])
        return o

    def _pool(self, site: Any, p: Any, k: Tensor, v: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor]:
        prefix, grid = site.grid.prefix, site.grid
        both = (k, v) if x is None else (linear(widened(x), widened(p.sr_weight), widened(p.sr_bias))[:, None],)
        found = []
        for t in both:
            image = t[:, :, prefix:].mT.flatten(1, 2).unflatten(2, (grid.h, grid.w))
            image = image if x is None else gelu(image)
            found.append(adaptive_avg_pool2d(image, self.pooled(grid)).flatten(2).unflatten(1, t.shape[1::2]).mT)
        if x is None:
            return found[0], found[1]
        rows = layer_norm(found[0][:, 0], x.shape[2:], widened(p.norm_weight), widened(p.norm_bias))
        made = linear(rows, widened(p.kv_weight), widened(p.kv_bias)).split(
            [site.kv_heads * site.dim, site.kv_heads * site.v_dim], 2
        )
        return tuple(t.unflatten(2, (site.kv_heads, -1)).transpose(1, 2) for t in made)

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(12)
        flat = v[:, :, :1].expand_as(v)

        def near(q: Tensor, k: Tensor, v: Tensor = v, **own: Tensor) -> Tensor:
            return attention(q, k, v, TransNeXt(sr_ratio=3), grid=(3, 4), params=own)

        yield Limit("a constant v comes out", lambda: near(q, k, flat), lambda: flat)
        yield Limit("longer queries see the same", lambda: near(3 * q, k), lambda: near(q, k))
        yield Limit("a bias behind the softmax adds its value",
                    lambda: near(q, k, learn_bias=torch.eye(9)[4].expand(4, 9)), lambda: near(q, k) + v)  # fmt: skip


def _window(grid: Grid, size: int, device: torch.device) -> Tensor:
    """(h * w, size * size): the tokens around each, row by row, -1 beyond the edge."""
    step = torch.arange(-(size // 2), size // 2 + 1, device=device)
    y = torch.arange(grid.h, device=device)[:, None, None, None] + step[:, None]
    x = torch.arange(grid.w, device=device)[None, :, None, None] + step
    inside = (y >= 0) & (y < grid.h) & (x >= 0) & (x < grid.w)
    return torch.where(inside, y * grid.w + x, -1).flatten(0, 1).flatten(1)
