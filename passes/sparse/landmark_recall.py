"""Landmark attention block by block: what a block of queries recalls of earlier ones, and where these then stand."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ...compiler.primitives.rows import as_type, repeat_heads, widened
from ...compiler.refusal import Refused
from ...compiler.rotary import turned


@dataclass(frozen=True)
class Recall:
    """Rows of the end of a sequence. With rope_theta, keys are unrotated, and those of earlier blocks move up.

    Of `a` earlier blocks k = min(top_k, a) are recalled, in their order. They stand in the k + 1 places before the own
    block: the last k blocks of all in their own places or the one they would push on, older ones from the first place
    on. Landmarks are compared at their own places if they are among the last k, else at the first.
    """

    size: int
    top_k: int | None
    shared: bool
    scale: float
    rope_theta: float | None

    def rows(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, n, Dv) for the last n rows q of k, v (B, Hkv, M, D)."""
        n, m, size = q.shape[2], k.shape[2], self.size
        if not isinstance(n, int) or not isinstance(m, int):
            raise Refused(f"{m} tokens, an open number", where="landmark block by block", fits="a known length")
        narrow, q, k, v = v.dtype, widened(q), widened(repeat_heads(k, q)), widened(repeat_heads(v, q))
        first = m - n
        edges = [first, *range((first // size + 1) * size, m, size), m]
        parts = [self._block(q[:, :, a - first : b - first], k[:, :, :b], v[:, :, :b]) for a, b in pairwise(edges)]
        return as_type(torch.cat(parts, 2), narrow)

    def _block(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rows of one block: a softmax over its tokens and the landmarks recalled, which hand on what they get."""
        size, n, m = self.size, q.shape[2], k.shape[2]
        start = (m - 1) // size * size
        i, j = torch.arange(m - n, m, device=q.device)[:, None], torch.arange(start, m, device=q.device)
        own = self.scale * q @ self._turned(k[:, :, start:], j).mT
        own = own.masked_fill((j > i) | (j == start + size - 1), -torch.inf)
        if start == 0:
            return _softmax(own) @ v
        keys, values = (t[:, :, :start].unflatten(2, (-1, size)) for t in (k, v))  # (B, H, a, L, D)
        chosen, places = self._chosen(q, keys[:, :, :, -1])  # (B, H, n | 1, k), the place of each one's first token
        keys, values = (self._taken(t, chosen) for t in (keys, values))  # (B, H, n | 1, k, L, D)
        keys = self._turned(keys, places[..., None] + torch.arange(size, device=q.device))
        scores = self.scale * (keys @ q[:, :, :, None, :, None]).squeeze(-1)  # (B, H, n, k, L)
        shares = _softmax(torch.cat((scores[..., -1], own), -1))
        gates, direct = shares[..., : chosen.shape[-1]], shares[..., chosen.shape[-1] :]
        within = torch.softmax(scores[..., :-1], -1)[..., None, :] @ values[..., :-1, :]  # (B, H, n, k, 1, Dv)
        return direct @ v[:, :, start:] + (gates[..., None] * within.squeeze(-2)).sum(3)

    def _chosen(self, q: Tensor, landmarks: Tensor) -> tuple[Tensor, Tensor]:
        """Which blocks are recalled, in order, and where their first tokens stand."""
        size, count, device = self.size, landmarks.shape[2], q.device
        most = count if self.top_k is None else min(self.top_k, count)
        base, last = (count - most - 1) * size, count - most
        number = torch.arange(count, device=device)
        slot = torch.where(number >= last, number - last + 1, 0)
        scores = self.scale * q @ self._turned(landmarks, base + slot * size + size - 1).mT  # (B, H, n, a)
        if self.shared:
            scores = torch.softmax(scores, -1).amax(2, keepdim=True)
        chosen = scores.sort(dim=-1, descending=True, stable=True).indices[..., :most].sort(-1).values
        rank = torch.arange(most, device=device)
        return chosen, base + (rank + (chosen >= last).long()) * size

    def _taken(self, t: Tensor, chosen: Tensor) -> Tensor:
        """Blocks t (B, H, a, L, D) by number (B, H, n, k): (B, H, n, k, L, D)."""
        at = chosen.flatten(2)[..., None, None].expand(-1, -1, -1, *t.shape[3:])
        return t.gather(2, at).unflatten(2, chosen.shape[2:])

    def _turned(self, k: Tensor, places: Tensor) -> Tensor:
        return k if self.rope_theta is None else turned(k, places, self.rope_theta)


def _softmax(scores: Tensor) -> Tensor:
    """Rows without a key are 0: the only token of a block may be its landmark."""
    return torch.nan_to_num(torch.softmax(scores, -1)) if scores.shape[-1] else scores
