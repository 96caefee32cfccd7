"""Queries and keys as complex numbers whose phases each head stretches and shifts, then softmax (arXiv 2505.10222)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...compiler.functional import attention
from ...compiler.live import KEPT
from ...compiler.mechanism import Limit, Mechanism, Param, register
from ...compiler.primitives.attend import attend
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.rotary import rotated
from ...compiler.site import Site
from ...compiler.starts import constant


@register("complexformer")
@dataclass(frozen=True)
class Complexformer(Mechanism):
    """score_ij = softmax_scale sum_c r_ic r_jc cos(delta_c (phi_ic - phi_jc) + phase_bias_c + (i - j) base^(-2c/D))

    Channels c and c + D/2 are real and imaginary part, r = sqrt(a^2 + b^2 + eps), phi = atan2(b, a). The cosine of a
    difference is a product of features: q' = r (cos, sin)(delta phi + phase_bias + i g), k' = r (cos, sin)(delta phi +
    j g), score = q' . k', and the softmax kernel stays. It takes the place of a rotation: q and k before it are used.

    >>> q, k, v = problem(6)
    >>> turned = rotated(q, k, None, 10000.0)
    >>> o = attention(q, k, v, "complexformer", causal=True, softmax_scale=None)
    >>> bool((o - attention(turned.q, turned.k, v, "softmax", causal=True)).abs().max() < 1e-5)
    True

    delta (H, D/2) starts at 1 and phase_bias (H, D/2) at 0: with softmax_scale=None (the site's) and the model's base a
    model with rotated halves (llama) is converted without loss. The reference draws delta with deviation (D/2)^-0.5
    and has no 1/sqrt(D): softmax_scale=1. Phases are float32 or better. With grouped heads keys are repeated, as delta
    is each query head's own. For delta that is no whole number the score jumps where a phase crosses pi. The paper has
    been withdrawn by its author; its code is public.
    """

    base: float = 10000.0
    softmax_scale: float | None = 1.0
    eps: float = 1e-9

    part = "core"
    kind = "needs recovery"
    honours = KEPT
    paper = "arXiv 2505.10222"
    tries = ({}, {"base": 100.0, "softmax_scale": None})

    def __post_init__(self) -> None:
        if self.base <= 0 or self.eps < 0:
            raise Refused(f"base={self.base}, eps={self.eps}", where="complexformer", fits="base > 0, eps >= 0")

    def fits(self, site: Site) -> str | None:
        if not site.self_attention:
            return "complexformer counts steps between queries and keys, this site is cross-attention"
        if site.dim % 2:
            return f"complexformer pairs channels, heads of {site.dim} do not halve"
        if "rope" in site.features and not {"q_nope", "k_nope"} <= set(site.ports):
            return "complexformer takes the place of a rotation, and what was rotated here is not known"
        return None

    def params(self, site: Site) -> Mapping[str, Param]:
        shape = (site.heads, site.dim // 2)
        return {"delta": Param(shape, constant(1.0)), "phase_bias": Param(shape)}

    def forward(
        self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor, q_nope: Tensor | None = None,
        k_nope: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        q, k = q if q_nope is None else q_nope, k if k_nope is None else k_nope
        if k.shape[2] != v.shape[2]:
            found = f"{k.shape[2]} keys before their rotation, {v.shape[2]} values: a cache keeps rotated keys"
            raise Refused(found, where="complexformer", fits="use_cache=False")
        group, n, m = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
        if group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scale = 1.0 if self.softmax_scale is None else self.softmax_scale / site.scale
        first = m - n  # the last query stands at the last key
        return attend(scale * self._turned(q, p.delta, p.phase_bias, first), self._turned(k, p.delta, None, 0), v,
                      site=site)  # fmt: skip

    def _turned(self, t: Tensor, delta: Tensor, bias: Tensor | None, first: Any) -> Tensor:
        """r (cos theta, sin theta), theta = delta phi + bias + position g."""
        wide = torch.promote_types(t.dtype, torch.float32)
        half = t.shape[-1] // 2
        a, b = t.to(wide).split(half, -1)
        r = torch.sqrt(a * a + b * b + self.eps)
        place = torch.arange(first, first + t.shape[2], device=t.device, dtype=wide)
        turn = self.base ** (-torch.arange(half, device=t.device, dtype=wide) / half)
        none = (a == 0) & (b == 0)  # 0 has no phase, and no gradient through one
        phi = torch.atan2(b, torch.where(none, 1.0, a))
        theta = delta.to(wide)[:, None] * phi + place[:, None] * turn
        if bias is not None:
            theta = theta + bias.to(wide)[:, None]
        return torch.cat((r * theta.cos(), r * theta.sin()), -1).to(t.dtype)

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(7)
        turned = rotated(q, k, None, 50.0)
        own = {"delta": torch.full((4, 4), 0.7), "phase_bias": torch.full((4, 4), 0.3)}
        more = own | {"phase_bias": own["phase_bias"] + 2 * math.pi}
        still = {"delta": torch.zeros(4, 4)}
        yield Limit("delta = 1 is rotated softmax",
                    lambda: attention(q, k, v, Complexformer(50.0, None), causal=True),
                    lambda: attention(turned.q, turned.k, v, "softmax", causal=True))  # fmt: skip
        yield Limit("a whole turn changes nothing", lambda: attention(q, k, v, self, params=own),
                    lambda: attention(q, k, v, self, params=more))  # fmt: skip
        yield Limit("with delta = 0 only magnitudes count", lambda: attention(q, k, v, self, params=still),
                    lambda: attention(-q, k.abs(), v, self, params=still))  # fmt: skip
