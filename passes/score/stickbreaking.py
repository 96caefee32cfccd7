"""Stick-breaking attention: every key, from the latest back, takes its share of what is left (arXiv 2306.04640)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...compiler.functional import attention
from ...compiler.live import KEPT
from ...compiler.mechanism import Limit, Mechanism, register
from ...compiler.primitives.attend import attend
from ...compiler.problem import problem
from ...compiler.site import Site


@register("stickbreaking")
@dataclass(frozen=True)
class Stickbreaking(Mechanism):
    """beta_ij = sigmoid(scale * q_i . k_j), A_ij = beta_ij prod_{j < t <= i} (1 - beta_it), o_i = sum_j A_ij v_j

    Rows sum to at most 1: what no key took is the remainder, which add_remainder gives to the row's own value.
    attend_current=False starts before the row's own key (the kernel library's choice; ModuleFormer starts at it).

    >>> q, k, v = problem(6)
    >>> halves = attention(0 * q, k, v, "stickbreaking", causal=True)  # every key takes half of what is left
    >>> bool((halves[:, :, 2] - (v[:, :, 2] / 2 + v[:, :, 1] / 4 + v[:, :, 0] / 8)).abs().max() < 1e-6)
    True

    Keys older than j never change A_ij, and positions need no encoding: the paper drops the rotation, which here stays
    in q and k where the model has one. Hidden keys take nothing. There is no softmax limit: it needs training.
    """

    attend_current: bool = True
    add_remainder: bool = False
    scale: float | None = None

    part = "core"
    kind = "needs recovery"
    honours = KEPT - {"sinks"}
    paper = "arXiv 2306.04640"
    tries = ({}, {"attend_current": False, "add_remainder": True}, {"scale": 0.5, "add_remainder": True})

    def fits(self, site: Site) -> str | None:
        if site.pattern != "causal-self":
            return f"stickbreaking needs the order of a causal-self site, this one is {site.pattern}"
        if self.add_remainder and site.features & {"bias", "mask"}:
            return "add_remainder gives a row its own value, which a mask or a bias may hide: add_remainder=False"
        return None

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None = None) -> Tensor:
        if self.scale is not None:
            q = q * (self.scale / site.scale)
        keep = None if self.attend_current else (lambda i, j: j < i)
        how: dict[str, Any] = {"keep": keep, "normaliser": "stick", "site": site}
        if not self.add_remainder:
            o: Tensor = attend(q, k, v, **how)
            return o
        o, log_left = attend(q, k, v, outputs=("o", "lse"), **how)
        own, first = v if key_padding is None else v * key_padding[:, None, :, None], v.shape[2] - q.shape[2]
        own = own[:, :, first:].repeat_interleave(q.shape[1] // v.shape[1], 1)  # of the queries that are here
        return o + log_left.exp()[..., None].to(o.dtype) * own

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(7)
        ones, up = torch.ones_like(v), torch.full_like(q, 8.0)
        age = torch.arange(7)[:, None] - torch.arange(7)
        halves = torch.where(age >= 0, 0.5 ** (age + 1), 0.0) @ v
        plain, whole, before = Stickbreaking(), Stickbreaking(add_remainder=True), Stickbreaking(attend_current=False)
        for says, m, queries, keys, values, expected in (
            ("shares and remainder sum to 1", whole, q, k, ones, ones),
            ("without scores every key takes half", plain, 0 * q, k, v, halves),
            ("a key that wants all takes all", plain, up, up, v, v),
            ("keys that want nothing leave nothing", plain, up, -up, v, 0 * v),
        ):
            yield Limit(
                says,
                lambda m=m, a=queries, b=keys, c=values: attention(a, b, c, m, causal=True),  # type: ignore[misc]
                lambda e=expected: e,  # type: ignore[misc]
            )
        first = lambda: attention(q, k, v, before, causal=True)[:, :, 0]
        yield Limit("the first row before its own key is empty", first, lambda: 0 * v[:, :, 0])
