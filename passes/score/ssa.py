"""A temperature for every query, from its position and its token, and a gate on every value (SSA, arXiv 2411.12892)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from ...compiler.functional import attention
from ...compiler.live import KEPT
from ...compiler.mechanism import Limit, Mechanism, Param, register
from ...compiler.primitives.attend import attend
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.site import Site
from ...compiler.starts import constant, uniform
from .seen_keys import seen_keys

STARTS = {"sigmoid": -10.0, "exp": 3.0, "linear": 0.0}  # pos_alpha at which c is 0 in float32, or nearly


@register("ssa")
@dataclass(frozen=True)
class Ssa(Mechanism):
    """o_i = sum_j softmax_j(t_i scale q_i . k_j) u_j v_j, t_i = tanh f_q(x_i) + 1 + c ln n_i, u_j = tanh f_v(x_j) + 1

    n_i is the number of keys that row i may see (its position, counted from 1, on a causal site; all of them on others,
    where the paper says nothing). c from pos_alpha: its sigmoid, exp(-exp(pos_alpha)) or itself (linear). Shared, f_q =
    temp_weight_q . gelu(W_q x) reuses the site's queries before rotation and f_v its values; else f = temp_weight .
    gelu(temp_proj x). One temperature and one gate for all heads. Both only scale rows: the softmax kernel stays.

    >>> q, k, v = problem(5)
    >>> p = {"pos_alpha": torch.tensor([2.0])}
    >>> o = attention(q, k, v, "ssa", causal=True, pos_param="linear", token_temp=False, value_temp=False, params=p)
    >>> hot = attention((1 + 2 * torch.tensor(5.0).log()) * q, k, v, "softmax", causal=True)
    >>> bool((o[:, :, 4] - hot[:, :, 4]).abs().max() < 1e-5)
    True

    It starts as softmax attention: temp_weight at 0, c at 5e-5 (sigmoid), 2e-9 (exp; further out it gets no gradient)
    or 0. Only these tensors need a large learning rate (the reference: 1e-2). value_pos: u_j has c ln n_j as well. No
    public code has f_q and f_v: their form is the paper's as others quote it.
    """

    pos_temp: bool = True
    pos_param: str = "sigmoid"
    token_temp: bool = True
    value_temp: bool = True
    value_pos: bool = False
    temp_shared: bool = True

    part = "core"
    kind = "needs recovery"
    honours = KEPT
    paper = "arXiv 2411.12892"
    heads_apart = False  # a token's temperature reads all of its heads
    tries = (
        {},
        {"pos_param": "exp", "value_pos": True},
        {"pos_param": "linear", "temp_shared": False},
        {"pos_temp": False, "value_temp": False},
    )

    def __post_init__(self) -> None:
        if self.pos_param not in STARTS:
            raise Refused(f"pos_param={self.pos_param!r}", where="ssa", fits=f"one of {', '.join(STARTS)}")
        if self.value_pos and not (self.pos_temp and self.value_temp):
            raise Refused("value_pos=True", where="ssa", fits="it with pos_temp and value_temp")

    def wanted_ports(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        x = () if self.temp_shared or not (self.token_temp or self.value_temp) else ("x",)
        return ("q", "k", "v", *x), ("q_nope", "x_kv", "key_padding")

    def fits(self, site: Site) -> str | None:
        alone = not self.temp_shared and (self.token_temp or self.value_temp)
        if alone and not site.width:
            return "ssa with temp_shared=False needs the width of x, which is not known here"
        return None

    def params(self, site: Site) -> Mapping[str, Param]:
        own = {"pos_alpha": Param((1,), constant(STARTS[self.pos_param]))} if self.pos_temp else {}
        widths = {"q": site.heads * site.dim, "v": site.kv_heads * site.v_dim}
        for name, wanted in (("q", self.token_temp), ("v", self.value_temp)):
            if wanted and not self.temp_shared:
                own[f"temp_proj_{name}"] = Param((site.width, site.width), uniform(site.width))
            if wanted:
                own[f"temp_weight_{name}"] = Param((1, widths[name] if self.temp_shared else site.width))
        return own

    def forward(
        self,
        site: Any,
        p: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_nope: Tensor | None = None,
        x: Tensor | None = None,
        x_kv: Tensor | None = None,
        key_padding: Tensor | None = None,
    ) -> Tensor:
        t = torch.ones((), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        u = t
        if self.pos_temp:
            t = t + self._warmth(p) * seen_keys(site, q, k, key_padding).log()  # (B|1, N)
        if self.value_pos:
            u = u + self._warmth(p) * seen_keys(site, k, k, key_padding).log()
        if self.token_temp:
            t = t + torch.tanh(self._read(p, "q", q if q_nope is None else q_nope, x, t.dtype))
        if self.value_temp:
            gate = torch.tanh(self._read(p, "v", v, x if x_kv is None else x_kv, t.dtype))
            if gate.shape[1] != v.shape[2]:
                found = f"x of {gate.shape[1]} tokens, {v.shape[2]} values: a cache does not keep x"
                raise Refused(found, where="ssa", fits="temp_shared=True, or use_cache=False")
            u = u + gate
        return attend(_scaled(q, t), k, _scaled(v, u), site=site)

    def _warmth(self, p: Any) -> Tensor:
        """c, in float32 or better."""
        alpha: Tensor = p.pos_alpha.to(torch.promote_types(p.pos_alpha.dtype, torch.float32))
        match self.pos_param:
            case "sigmoid":
                return torch.sigmoid(alpha)
            case "exp":
                return torch.exp(-torch.exp(alpha))
        return alpha

    def _read(self, p: Any, name: str, projected: Tensor, x: Tensor | None, wide: torch.dtype) -> Tensor:
        """f of every token: (B, N)."""
        weight = getattr(p, f"temp_weight_{name}").to(wide)
        if self.temp_shared:
            tokens = projected.transpose(1, 2).flatten(2).to(wide)  # W x, its heads side by side
        else:
            assert x is not None
            tokens = linear(x.to(wide), getattr(p, f"temp_proj_{name}").to(wide))
        return linear(gelu(tokens), weight).squeeze(-1)

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(7)
        cold = {"pos_alpha": torch.tensor([-100.0])}
        plain = lambda: attention(q, k, v, "softmax", causal=True)
        yield Limit("without warmth and weights it is softmax",
                    lambda: attention(q, k, v, Ssa(), causal=True, params=cold), plain)  # fmt: skip
        yield Limit("the first row is its own value", lambda: attention(
            q, k, v, Ssa(value_temp=False), causal=True, params={"pos_alpha": torch.tensor([5.0])})[:, :, :1],
            lambda: v[:, :, :1])  # fmt: skip
        yield Limit("a constant gate scales the output", lambda: attention(
            q, k, torch.ones_like(v), Ssa(token_temp=False), causal=True,
            params={**cold, "temp_weight_v": torch.full((1, 32), 0.02)}),
            lambda: (1 + torch.tanh(32 * 0.02 * gelu(torch.ones(())))).expand_as(v))  # fmt: skip
        sharp = Ssa(pos_param="linear", token_temp=False, value_temp=False)
        best = (q @ k.mT).argmax(-1)[..., None].expand_as(v)
        yield Limit("without end it picks the best key", lambda: attention(
            q, k, v, sharp, params={"pos_alpha": torch.tensor([1e5])}), lambda: v.gather(2, best))  # fmt: skip


def _scaled(t: Tensor, rows: Tensor) -> Tensor:
    """(B, H, N, D) times a number per row, (), (N,) or (B|1, N)."""
    return (t * (rows[:, None, :, None] if rows.ndim == 2 else rows)).to(t.dtype)
