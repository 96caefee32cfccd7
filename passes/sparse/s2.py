"""S2-Attention: a head sees its latest blocks and every `vert_stride`-th far one, each others (arXiv 2407.17678)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...compiler.functional import attention
from ...compiler.live import KEPT
from ...compiler.mechanism import Limit, Mechanism, register
from ...compiler.primitives.attend import attend
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.site import Site
from .block_pattern import Blocks, checked, kept, misfit

PLACES = (None, "absolute", "relative")


@register("s2")
@dataclass(frozen=True)
class S2(Mechanism):
    """o_i = softmax over the keys j of allowed blocks; with a = i // block_size, c = j // block_size and key head g:

    absolute (causal sites)      a - c < local_blocks or (c + g * head_sliding_step + head_sliding_offset) % vert_stride
                                 is 0: the same far blocks for all queries, so that a block once left is never needed.
    relative (noncausal sites)   the distance beyond the local blocks is a multiple of vert_stride; no head differs.

    Causal attention sees j <= i of these. local_blocks counts the own block; a noncausal site takes (left, right).
    The last num_dense_heads key heads see everything; homo_head gives all heads the pattern of head 0. Left out,
    head_sliding_step is max(1, vert_stride // query heads), as in the reference, and num_kv_heads is the site's.

    A pattern of your own, (query heads or 1, blocks, blocks) of 0 and 1 with every own block in it, takes the place of
    these rules; a block beyond the pattern sees itself alone.

    >>> q, k, v = problem(8)
    >>> o = attention(q, k, v, "s2", causal=True, block_size=2, local_blocks=1, vert_stride=4, homo_head=True)
    >>> seen = attention(q[:, :, 7:], k[:, :, [0, 1, 6, 7]], v[:, :, [0, 1, 6, 7]], "softmax")  # blocks 0 and 3
    >>> bool((o[:, :, 7:] - seen).abs().max() < 1e-6)
    True
    """

    block_size: int = 64
    local_blocks: int | tuple[int, int] = 16
    vert_stride: int = 8
    homo_head: bool = False
    num_dense_heads: int = 0
    num_kv_heads: int | None = None
    head_sliding_step: int | None = None
    head_sliding_offset: int = 0
    vert_position_type: str | None = None
    pattern: Blocks | None = None

    part = "core"
    kind = "needs recovery"
    honours = KEPT
    paper = "arXiv 2407.17678"
    heads_alike = False
    tries = (
        {"block_size": 2, "local_blocks": 1, "vert_stride": 3},
        {"block_size": 2, "local_blocks": 2, "vert_stride": 3, "num_dense_heads": 1, "head_sliding_offset": 1},
        {"block_size": 3, "local_blocks": 1, "vert_stride": 2, "vert_position_type": "relative"},
        {"block_size": 3, "pattern": (((1, 0, 0), (1, 1, 0), (0, 1, 1)),)},
    )

    def __post_init__(self) -> None:
        if isinstance(self.local_blocks, list | tuple):
            object.__setattr__(self, "local_blocks", tuple(self.local_blocks))
        least = min(self._sides)
        if self.block_size < 1 or self.vert_stride < 1 or least < 1 or self.num_dense_heads < 0:
            found = f"block_size={self.block_size}, local_blocks={self.local_blocks}, vert_stride={self.vert_stride}"
            raise Refused(found, where="s2", fits="all at least 1: a query sees its own block")
        if self.vert_position_type not in PLACES:
            raise Refused(f"vert_position_type={self.vert_position_type!r}", where="s2", fits=f"one of {PLACES}")
        if self.homo_head and self.num_dense_heads:
            found = f"homo_head with num_dense_heads={self.num_dense_heads}"
            raise Refused(found, where="s2", fits="heads that may differ")
        if self.pattern is not None:
            object.__setattr__(self, "pattern", checked(self.pattern, "s2"))
            if self.homo_head or self.num_dense_heads or self.vert_position_type:
                raise Refused("a pattern with heads or positions of a rule", where="s2", fits="one of the two")

    @property
    def _sides(self) -> tuple[int, int]:
        """Local blocks to the left and to the right, the own one counted in both."""
        return self.local_blocks if isinstance(self.local_blocks, tuple) else (self.local_blocks, self.local_blocks)

    def fits(self, site: Site) -> str | None:
        if not site.self_attention:
            return "s2 compares blocks of one sequence, this site is cross-attention"
        if site.causal and isinstance(self.local_blocks, tuple):
            return f"local_blocks={self.local_blocks} looks to the right, this site is causal: give one number"
        if self.pattern is not None:
            return misfit(self.pattern, site, "s2")
        heads = self.num_kv_heads or site.kv_heads
        if site.heads % heads or self.num_dense_heads > heads:
            return f"s2: {heads} key heads, {self.num_dense_heads} of them dense, for {site.heads} heads"
        return None

    def keep(self, site: Any) -> Callable[..., Any]:
        """The predicate at a site; what a causal mask adds is left to the site."""
        kv = self.num_kv_heads or site.kv_heads
        step = self.head_sliding_step
        step = max(1, self.vert_stride // site.heads) if step is None else step
        place = self.vert_position_type or ("absolute" if site.causal else "relative")
        (left, right), size, stride, shared = self._sides, self.block_size, self.vert_stride, site.heads // kv

        def absolute(h: Any, i: Any, j: Any) -> Any:
            a, c = i // size, j // size
            phase = self.head_sliding_offset if self.homo_head else h // shared * step
            phase = phase if self.homo_head else phase + self.head_sliding_offset
            return ((a - c < left) & (c - a < right)) | ((c + phase) % stride == 0)

        def relative(h: Any, i: Any, j: Any) -> Any:
            a, c = i // size, j // size
            before = (a - c >= left) & ((a - c - left + 1) % stride == 0)
            after = (c - a >= right) & ((c - a - right + 1) % stride == 0)
            return ((a - c < left) & (c - a < right)) | before | after

        chosen = absolute if place == "absolute" else relative
        if not self.num_dense_heads:
            return chosen
        first = (kv - self.num_dense_heads) * shared
        return lambda h, i, j: chosen(h, i, j) | (h >= first)

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = self.keep(site) if self.pattern is None else kept(self.pattern, self.block_size, q.device)
        return attend(q, k, v, keep=keep, site=site)

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(11)
        for causal in (True, False):
            full = lambda causal=causal: attention(q, k, v, "softmax", causal=causal)
            kind = "causal" if causal else "noncausal"
            for says, same in (
                ("a stride of 1", S2(2, 1, 1)),
                ("local blocks everywhere", S2(2, 6, 9)),
                ("dense heads only", S2(2, 1, 9, num_dense_heads=4)),
            ):
                run = lambda same=same, causal=causal: attention(q, k, v, same, causal=causal)
                yield Limit(f"{says}: full attention ({kind})", run, full)
