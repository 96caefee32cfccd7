"""Tokens of a grid cut into windows: which rows stand in each, and attention of every window as a sample of its own.

Row numbers count from the first token of the grid, -1 is beyond its edge. Prefix tokens (class, registers) have no
place on the grid: they see every key, and every window sees them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...compiler.on_grid import off_grid
from ...compiler.primitives.attend import Relative, attend
from ...compiler.primitives.gather import gather
from ...compiler.primitives.group import group
from ...compiler.site import Grid, Site
from ...compiler.symbols import build, table


@dataclass(frozen=True)
class Cut:
    """A grid in windows of h x w tokens, in row order; moved by `shift`, the grid is a torus."""

    grid: Grid
    h: int
    w: int
    shift: tuple[Any, Any] = (0, 0)  # numbers, or tensors of no dimension

    @property
    def counts(self) -> tuple[int, int]:
        return -(-self.grid.h // self.h), -(-self.grid.w // self.w)

    @property
    def ragged(self) -> bool:
        return bool(self.grid.h % self.h or self.grid.w % self.w)

    def rows(self, device: torch.device, halo: int = 0, stride: int = 1) -> Tensor:
        """(windows, tokens of one) row numbers, with `halo` tokens around each window, of which every stride-th."""
        y = self._lines(self.counts[0], self.h, halo, stride, device)[:, None, :, None]
        x = self._lines(self.counts[1], self.w, halo, stride, device)[None, :, None, :]
        inside = (y >= 0) & (y < self.grid.h) & (x >= 0) & (x < self.grid.w)
        y, x = (y + self.shift[0]) % self.grid.h, (x + self.shift[1]) % self.grid.w
        return torch.where(inside, y * self.grid.w + x, -1).flatten(0, 1).flatten(1)

    def back(self, device: torch.device) -> Tensor:
        """Where each token of the grid stands among the rows of all windows in order."""
        y = (torch.arange(self.grid.h, device=device)[:, None] - self.shift[0]) % self.grid.h
        x = (torch.arange(self.grid.w, device=device) - self.shift[1]) % self.grid.w
        window = y // self.h * self.counts[1] + x // self.w
        return (window * (self.h * self.w) + y % self.h * self.w + x % self.w).flatten()

    def wrapped(self, device: torch.device) -> Tensor:
        """(windows, tokens of one): equal where no edge of the picture lies between two tokens of a window."""
        y = self._lines(self.counts[0], self.h, 0, 1, device)[:, None, :, None] + self.shift[0] >= self.grid.h
        x = self._lines(self.counts[1], self.w, 0, 1, device)[None, :, None, :] + self.shift[1] >= self.grid.w
        return (2 * y + x).flatten(0, 1).flatten(1)

    def every(self, stride: int) -> Cut:
        """The same windows over every stride-th row and column."""
        grid = replace(self.grid, h=self.grid.h // stride, w=self.grid.w // stride)
        return replace(self, grid=grid, h=self.h // stride, w=self.w // stride)

    def _lines(self, count: int, size: int, halo: int, stride: int, device: torch.device) -> Tensor:
        """Coordinates along one axis (windows, tokens)."""
        near = torch.arange(-halo, size + halo, stride, device=device)
        return torch.arange(count, device=device)[:, None] * size + near


def attend_windows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cut: Cut,
    *,
    scale: float,
    halo: int = 0,
    stride: int = 1,
    beyond: str = "mask",
    relative: Sequence[Relative] = (),
    key_padding: Tensor | None = None,
    pad: tuple[Tensor, Tensor] | None = None,
    apart: Tensor | None = None,
) -> Tensor:
    """Every window's queries over the keys of the window and its halo (and prefix keys).

    stride         of every stride-th query of a window, rows and columns alike, there is an answer.
    beyond="mask"  places beyond the edge are no keys; "zero": they are keys and values of 0, or `pad` (H, D) each.
    apart          labels (windows, tokens of one): tokens of different ones do not see one another.
    relative       terms of keys that stand in the window, i and j counted in it.
    """
    prefix, device = cut.grid.prefix, q.device
    own = cut.rows(device, stride=stride)
    keys = _with_prefix(cut.rows(device, halo), prefix)
    queries = group(q, torch.where(own < 0, -1, own + prefix))[0]
    near_k, near_v, held = _near(k, v, keys, key_padding, pad)
    if beyond == "zero":
        held = held | (keys < 0)
    masked = key_padding is not None or (beyond == "mask" and (halo > 0 or cut.ragged))
    flags = held[:, 0].flatten(0, 1) if masked else None  # the same in all heads
    count = keys.shape[1] - prefix
    o = attend(
        *(_samples(t) for t in (queries, near_k, near_v)),
        scale=scale,
        keep=_kept(flags, apart, count),
        score=_without_terms(count, scale) if relative and prefix else None,
        relative=relative,
    )
    o = gather(o.unflatten(0, (q.shape[0], -1)).transpose(1, 2).flatten(2, 3), cut.every(stride).back(device))
    if not prefix:
        return o
    return torch.cat((attend(q[:, :, :prefix], k, v, scale=scale, keep=_seen(key_padding)), o), 2)


def _with_prefix(keys: Tensor, prefix: int) -> Tensor:
    """The rows of every window's keys, counted with the prefix tokens in front of the grid, which stand last."""
    front = torch.arange(prefix, device=keys.device).expand(keys.shape[0], prefix)
    return torch.cat((torch.where(keys < 0, -1, keys + prefix), front), 1)


def _near(
    k: Tensor, v: Tensor, keys: Tensor, key_padding: Tensor | None, pad: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of every window (B, H, windows, tokens, D), and which of them stand."""
    near_k, held = group(k, keys, valid=key_padding)
    near_v = group(v, keys, valid=key_padding)[0]
    if pad is not None:
        none = (keys < 0)[:, :, None]
        near_k, near_v = (torch.where(none, of[:, None, None], t) for of, t in zip(pad, (near_k, near_v), strict=True))
    return near_k, near_v, held


def _without_terms(count: int, scale: float) -> Any:
    """The score of two relative terms, taken away again from prefix keys, which stand behind `count` others."""
    return lambda s, r0, r1, j: build("where", j < count, s, s - (r0 + r1) * scale)


def no_grid(site: Site, slug: str) -> str | None:
    """Why a mechanism of pictures cannot stand at a site, or None."""
    if not site.self_attention or site.causal:
        return f"{slug} is noncausal self-attention on a picture, this site is {site.pattern}"
    return off_grid(site, slug)


def _samples(t: Tensor) -> Tensor:
    """(B, H, windows, tokens, D) as (B * windows, H, tokens, D)."""
    return t.transpose(1, 2).flatten(0, 1)


def _seen(flags: Tensor | None) -> Any:
    """The keys that stand, where some do not."""
    if flags is None:
        return None
    standing = table(flags)
    return lambda b, j: standing[b, j]


def _kept(flags: Tensor | None, apart: Tensor | None, count: int) -> Any:
    """Which keys stand, by sample; and which queries of a window see them, the same in every picture."""
    if apart is None:
        return _seen(flags)
    own, windows = table(apart), apart.shape[0]

    def near(b: Any, i: Any, j: Any) -> Any:
        same = (own[b % windows, i] == own[b % windows, j]) | (j >= count)
        return same if flags is None else same & table(flags)[b, j]

    return near
