"""Dual attention: windows of tokens, and groups of channels that attend to one another (DaViT, arXiv 2204.03645)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...compiler.functional import attention
from ...compiler.mechanism import Limit, Mechanism, Param, register
from ...compiler.primitives.attend import attend
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.site import Site
from .grid_windows import Cut, attend_windows, no_grid


@register("davit")
@dataclass(frozen=True)
class DaViT(Mechanism):
    """over window: softmax(scale q kᵀ) v inside windows of the grid; over channel: tokens and channels change places.

    channel, in each group of channels: A = softmax(scale qᵀ k), a row for each channel of q, and o = v Aᵀ; with
    roles kvq (the code of DaViT's first version) k, v, q stand for q, k, v. Its sum over tokens is not
    averaged: scale_by dim is the site's scale, tokens is N ** -0.5 over the real tokens (Florence-2). groups are the
    heads unless given; channels are counted head by head. Padding tokens count as zeros.

    >>> q, k, v = problem(6)
    >>> o = attention(q, k, v, "davit", kind="channel")
    >>> A = (q.mT @ k * 8**-0.5).softmax(-1)
    >>> bool((o - v @ A.mT).abs().max() < 1e-5)
    True

    window: what the grid does not fill is masked, with pad_mode fill it is keys pad_k and values pad_v (H, D), which
    share the softmax (the projections' biases in the reference), with none it is refused. shift moves the windows on a
    torus. The recipe's word for kind is over. Windows keep to a pretrained softmax; channels do not and need training.
    """

    over: Literal["window", "channel"] = "window"
    window: int | tuple[int, int] = 7
    shift: tuple[int, int] = (0, 0)
    pad_mode: Literal["none", "fill", "mask"] = "mask"
    groups: int | None = None
    scale_by: Literal["dim", "tokens"] = "dim"
    roles: Literal["qkv", "kvq"] = "qkv"

    part = "core"
    kind = "needs recovery"
    honours = {"padding"}
    least = {"groups": 1}
    paper = "arXiv 2204.03645"
    also = {"kind": "over"}
    tries = (
        {"window": 2},
        {"window": (2, 3), "pad_mode": "fill", "shift": (1, 1)},
        {"over": "channel"},
        {"over": "channel", "scale_by": "tokens", "roles": "kvq"},
    )

    def __post_init__(self) -> None:
        for knob in ("window", "shift"):
            value = getattr(self, knob)
            object.__setattr__(self, knob, (value, value) if isinstance(value, int) else tuple(value))
        if self.over not in ("window", "channel") or min(self.window) < 1:  # type: ignore[arg-type]
            found = f"kind={self.over!r}, window={self.window}"
            raise Refused(found, where="davit", fits="window or channel, windows of 1 or more")

    def fits(self, site: Site) -> str | None:
        if self.over == "window":
            ragged = site.grid is not None and self._cut(site).ragged
            if ragged and self.pad_mode == "none":
                return f"windows of {self.window} do not tile this grid: pad_mode mask or fill"
            return no_grid(site, "davit")
        if site.causal or not site.self_attention:
            return f"channels attend over all tokens at once, this site is {site.pattern}"
        if site.dim != site.v_dim or site.heads * site.dim % (self.groups or 1):
            return f"groups={self.groups} of {site.heads} heads with {site.dim} channels, {site.v_dim} of v"
        return None

    def params(self, site: Site) -> Mapping[str, Param]:
        if self.over == "channel" or self.pad_mode != "fill":
            return {}
        return {"pad_k": Param((site.heads, site.dim)), "pad_v": Param((site.heads, site.v_dim))}

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None = None) -> Tensor:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        if self.over == "channel":
            return self._channels(site, q, k, v, key_padding)
        fill = self.pad_mode == "fill" and self._cut(site).ragged
        return attend_windows(q, k, v, self._cut(site), scale=site.scale, beyond="zero" if fill else "mask",
                              pad=(p.pad_k, p.pad_v) if fill else None, key_padding=key_padding)  # fmt: skip

    def _cut(self, site: Any) -> Cut:
        h, w = self.window  # type: ignore[misc]
        return Cut(site.grid, h, w, self.shift)

    def _channels(self, site: Any, q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None) -> Tensor:
        heads, wide = q.shape[1], torch.promote_types(q.dtype, torch.float32)
        real = torch.ones(q.shape[0], 1, q.shape[2], 1, dtype=wide, device=q.device)
        if key_padding is not None:
            real = real * key_padding[:, None, :, None]
            k, v = (torch.where(real != 0, t, 0.0) for t in (k, v))
        q, k, v = (_regroup(t, self.groups or heads) for t in (q, k, v))
        if self.roles == "kvq":
            q, k, v = k, v, q
        if self.scale_by == "tokens":
            scale, q = 1.0, (q * real.sum(2, keepdim=True).clamp(min=1).rsqrt()).to(k.dtype)
        else:
            scale = site.scale if self.groups in (None, heads) else q.shape[-1] ** -0.5
        return _regroup(attend(q.mT, k.mT, v.mT, scale=scale).mT, heads)

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(12)
        channel = DaViT("channel", roles="kvq")
        yield Limit("a window over the picture is full attention",
                    lambda: attention(q, k, v, DaViT(window=4), grid=(3, 4)),
                    lambda: attention(q, k, v, "softmax"))  # fmt: skip
        yield Limit("without a scale every channel is the mean of v's",
                    lambda: attention(0 * q, k, v, DaViT("channel")),
                    lambda: v.mean(-1, keepdim=True))  # fmt: skip
        yield Limit("kvq is qkv by other names", lambda: attention(q, k, v, channel),
                    lambda: attention(k, v, q, DaViT("channel")))  # fmt: skip
        order = torch.arange(12).roll(5)
        yield Limit("tokens in another order",
                    lambda: attention(q[:, :, order], k[:, :, order], v[:, :, order], channel),
                    lambda: attention(q, k, v, channel)[:, :, order])  # fmt: skip


def _regroup(t: Tensor, groups: int) -> Tensor:
    """(B, H, N, D) with its channels, counted head by head, in other groups."""
    if groups == t.shape[1]:
        return t
    return t.transpose(1, 2).flatten(2).unflatten(2, (groups, -1)).transpose(1, 2)
