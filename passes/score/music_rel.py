"""A learned logit for how many steps back a key stands, q_i . E[i - j] (Music Transformer, arXiv 1809.04281)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...compiler.functional import attention
from ...compiler.live import KEPT
from ...compiler.mechanism import Limit, Mechanism, Param, register
from ...compiler.primitives.attend import Relative, attend
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.site import Site


@register("music_rel")
@dataclass(frozen=True)
class MusicRel(Mechanism):
    """logit_ij = scale * (q_i . k_j + q_i . E[max_len - 1 - (i - j)]), then softmax; nothing relative on the values.

    E is rel_emb (max_len, D), or (H, max_len, D) without share_heads: its last row is distance 0, its first max_len - 1
    steps back. It starts at 0, which is softmax attention. A noncausal site has max_len - 1 further rows behind, for
    the keys to the right (the paper's unmasked local blocks).

    >>> q, k, v = problem(5)
    >>> E = torch.zeros(3, 8)
    >>> E[-1] = q[0, 0, 2]  # only the token's own key is raised
    >>> o = attention(q, k, v, "music_rel", causal=True, max_len=3, params={"rel_emb": 1e4 * E})
    >>> bool((o[0, 0, 2] - v[0, 0, 2]).abs().max() < 1e-6)
    True

    clip: keys further away share the outermost row; without it a longer sequence is refused, where its length is known.
    The table is looked up by i - j, so no N x N x D tensor is ever formed.
    """

    max_len: int = 2048
    share_heads: bool = True
    clip: bool = True

    part = "core"
    kind = "needs recovery"
    honours = KEPT
    paper = "arXiv 1809.04281"
    tries = ({}, {"max_len": 4}, {"max_len": 40, "share_heads": False, "clip": False})

    def __post_init__(self) -> None:
        if self.max_len < 1:
            raise Refused(f"max_len={self.max_len}", where="music_rel", fits="max_len >= 1")

    def fits(self, site: Site) -> str | None:
        if not site.self_attention:
            return "music_rel counts steps between queries and keys, this site is cross-attention"
        if not self.clip and site.keys.isdigit() and int(site.keys) > self.max_len:
            return f"{site.keys} tokens, a table of max_len={self.max_len} rows: clip=True, or a longer table"
        return None

    def params(self, site: Site) -> Mapping[str, Param]:
        rows = self.max_len if site.causal else 2 * self.max_len - 1
        heads = () if self.share_heads else (site.heads,)
        return {"rel_emb": Param((*heads, rows, site.dim))}

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        table = p.rel_emb[None] if self.share_heads else p.rel_emb
        back = Relative(table, lambda i, j: self.max_len - 1 - (i - j))  # the index is clamped to the rows there are
        return attend(q, k, v, relative=[back], site=site)

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(7)
        E = 0.5 * torch.randn(7, 8, generator=torch.Generator().manual_seed(1))
        alike, own = q[:, :, :1].expand_as(q), E.clone()
        own[:-1] = 0
        i, j = torch.arange(7)[:, None], torch.arange(7)
        toeplitz = 8**-0.5 * (alike[:, :, :1] @ E.mT).squeeze(2)[:, :, (6 - (i - j)).clamp(0, 6)]
        diagonal = 8**-0.5 * torch.diag_embed(q @ E[-1])
        for says, queries, rows, bias in (
            ("a table of 0 is softmax", q, 0 * E, None),
            ("equal queries make it a Toeplitz bias", alike, E, toeplitz),
            ("a table of distance 0 alone raises the diagonal", q, own, diagonal),
        ):
            yield Limit(
                says,
                lambda a=queries, t=rows: attention(a, k, v, MusicRel(7), causal=True, params={"rel_emb": t}),  # type: ignore[misc]
                lambda a=queries, b=bias: attention(a, k, v, "softmax", causal=True, bias=b),  # type: ignore[misc]
            )
