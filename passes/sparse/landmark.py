"""Landmark attention: a block's last token stands for it, and hands its weight to the others (arXiv 2305.16300)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...compiler.functional import attention
from ...compiler.mechanism import Limit, Mechanism, register
from ...compiler.primitives.attend import attend
from ...compiler.primitives.gather import gather
from ...compiler.primitives.rows import repeat_heads
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.site import Site
from ...compiler.symbols import table
from .landmark_recall import Recall


@register("landmark")
@dataclass(frozen=True)
class Landmark(Mechanism):
    """w_ij = P_j in the query's own block, P_lm(g) S_gj in an earlier block g, 0 on every landmark.

    P is one softmax over the own block's tokens so far and the landmarks of all earlier blocks, S_g one over the
    ordinary tokens of block g. The landmark of a block is its last token, every block_size-th one; the port is_landmark
    (B, N) names others, with blocks of any length. A landmark does not see itself; its value is never read. The model
    must be trained with a landmark token after every block_size - 1 tokens: that is the data's part, not done here.

    top_k: a query sees, per head, the top_k earlier blocks whose landmarks score highest. Positions stay as they are.
    renumber: the reference's retrieval, whose rotations stay in the trained range: the blocks retrieved move up to the
    top_k + 1 places before the query's own block, and landmarks of blocks older than the last top_k are compared as if
    they stood in the first of these. Keys come unrotated as k_nope and are rotated here, base rope_theta; the length
    must be known.
    retrieve_per: head_max_over_tokens gives all queries of a block the same top_k blocks, by their largest share
    in a softmax over the landmarks before: what a row sees then depends on later queries of its block, as in the paper.

    A Decoder keeps all keys and values, the keys unrotated (given as k_nope) where they are renumbered.

    >>> q, k, v = problem(6)
    >>> o = attention(q, k, v, "landmark", causal=True, block_size=3)
    >>> bool((o[:, :, :2] - attention(q, k, v, "softmax", causal=True)[:, :, :2]).abs().max() < 1e-6)
    True
    """

    block_size: int = 64
    top_k: int | None = None
    retrieve_per: Literal["token_head", "head_max_over_tokens"] = "token_head"
    renumber: bool = False
    rope_theta: float = 10000.0

    part = "core"
    kind = "needs recovery"
    honours = frozenset({"padding"})
    paper = "arXiv 2305.16300"
    tries = ({"block_size": 3}, {"block_size": 2, "top_k": 2}, {}, {"block_size": 3, "top_k": 1, "renumber": True})

    def __post_init__(self) -> None:
        if self.block_size < 2 or (self.top_k is not None and self.top_k < 1):
            found = f"block_size={self.block_size}, top_k={self.top_k}"
            raise Refused(found, where="landmark", fits="a landmark with at least one token, top_k at least 1")
        if self.retrieve_per not in ("token_head", "head_max_over_tokens"):
            found = f"retrieve_per={self.retrieve_per!r}"
            raise Refused(found, where="landmark", fits="token_head or head_max_over_tokens")
        if self.renumber and self.top_k is None:
            raise Refused("renumber without top_k", where="landmark", fits="top_k, how many blocks are retrieved")

    def wanted_ports(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (("q", "k", "v", "k_nope"), ()) if self.renumber else (("q", "k", "v"), ("is_landmark",))

    def fits(self, site: Site) -> str | None:
        if site.pattern != "causal-self":
            return f"landmark looks back at closed blocks, this site is {site.pattern}"
        if self.top_k is not None and site.queries != site.keys:
            return "landmark: top_k counts the blocks of one sequence, here are past keys beside it"
        if self.top_k is not None and "is_landmark" in site.ports:
            return "landmark: top_k takes equal blocks, not the port is_landmark"
        if self.renumber and "padding" in site.features:
            return "landmark: renumber counts all tokens, here is padding"
        return None

    def _recall(self, site: Any) -> Recall:
        shared = self.retrieve_per != "token_head"
        return Recall(self.block_size, self.top_k, shared, site.scale, self.rope_theta if self.renumber else None)

    def state(self, site: Any, q: Tensor) -> Mapping[str, Tensor]:
        return {"k": q[:, : site.kv_heads, :0], "v": q.new_zeros(q.shape[0], site.kv_heads, 0, site.v_dim)}

    def prefill(
        self,
        site: Any,
        p: Any,
        state: Mapping[str, Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_nope: Tensor | None = None,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        if self.renumber and k_nope is None:
            raise Refused("no k_nope", where="landmark: decode", fits="the unrotated keys beside q, k and v")
        kept = {"k": torch.cat((state["k"], k if k_nope is None else k_nope), 2), "v": torch.cat((state["v"], v), 2)}
        return self._recall(site).rows(q, kept["k"], kept["v"]), kept

    step = prefill

    def forward(
        self,
        site: Any,
        p: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        is_landmark: Tensor | None = None,
        k_nope: Tensor | None = None,
    ) -> Tensor:
        if self.renumber and k_nope is not None:
            return self._recall(site).rows(q, k_nope, v)
        blocks = self._equal() if is_landmark is None else _given(is_landmark)
        shared = self.retrieve_per != "token_head"
        retrieved = self._retrieved_by_block if shared else self._retrieved
        chosen = None if self.top_k is None else table(retrieved(site.scale, q, k, v))

        def keep(b: Any, h: Any, i: Any, j: Any) -> Any:
            block, landmark = blocks
            own = block(b, j) == block(b, i)
            seen = ~(own & (landmark(b, j) == j))
            if chosen is None:
                return seen
            asking = i // self.block_size if shared else i
            return seen & (own | (chosen[b, h, asking, j // self.block_size] != 0))

        def leader(b: Any, i: Any, j: Any) -> Any:
            block, landmark = blocks
            return torch.where(block(b, j) == block(b, i), j, landmark(b, j))

        return attend(q, k, v, keep=keep, leader=leader, normaliser="grouped", site=site)

    def _equal(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The block of a token, and where its landmark stands."""
        size = self.block_size
        return (lambda b, j: j // size), (lambda b, j: j // size * size + size - 1)

    def _landmarks(self, k: Tensor) -> tuple[int, Tensor]:
        """How many blocks there are, and where their landmarks stand."""
        size, count = self.block_size, (k.shape[2] + self.block_size - 1) // self.block_size
        at = torch.arange(count, device=k.device) * size + size - 1  # the last may lie beyond the end: -1, no row
        return count, torch.where(at < k.shape[2], at, -1)

    def _retrieved(self, scale: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Which earlier blocks each query sees (B, H, N, blocks): its top_k landmarks."""
        size, (count, at) = self.block_size, self._landmarks(k)
        best = attend(q, gather(k, at), gather(v, at), scale=scale, keep=lambda i, j: j < i // size,
                      outputs=(f"topk:{self.top_k}",))  # fmt: skip
        none = torch.zeros(*best.shape[:3], count + 1, dtype=torch.bool, device=q.device)
        return none.scatter(-1, torch.where(best < 0, count, best), torch.ones_like(best, dtype=torch.bool))

    def _retrieved_by_block(self, scale: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Which earlier blocks each block of queries sees (B, H, blocks, blocks), equal ones by number."""
        size, (count, at) = self.block_size, self._landmarks(k)
        wide = torch.promote_types(q.dtype, torch.float32)
        z = scale * q.to(wide) @ gather(repeat_heads(k, q), at).to(wide).mT  # (B, H, N, blocks)
        a, c = torch.arange(q.shape[2], device=q.device)[:, None] // size, torch.arange(count, device=q.device)
        share = torch.where(c < a, torch.softmax(torch.where(c < a, z, -1e30), -1), 0.0)
        most = pad(share, (0, 0, 0, count * size - q.shape[2])).unflatten(2, (count, size)).amax(3)
        rank = most.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
        return (rank < self.top_k) & (c < c[:, None])

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(11)
        yield Limit(
            "a block longer than n is causal attention",
            lambda: attention(q, k, v, Landmark(12), causal=True),
            lambda: attention(q, k, v, "softmax", causal=True),
        )
        yield Limit(
            "as many blocks retrieved as there are",
            lambda: attention(q, k, v, Landmark(3, 4), causal=True),
            lambda: attention(q, k, v, Landmark(3), causal=True),
        )
        flat = v[:, :, :1].expand_as(v)
        yield Limit("a constant v comes out", lambda: attention(q, k, flat, Landmark(3), causal=True), lambda: flat)
        ends = (torch.arange(11) % 3 == 2).expand(2, 11)
        yield Limit(
            "landmarks named one by one",
            lambda: attention(q, k, v, Landmark(9), causal=True, ports={"is_landmark": ends}),
            lambda: attention(q, k, v, Landmark(3), causal=True),
        )


def _given(is_landmark: Tensor) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The same for blocks of any length: the landmarks before a token, and the next one from it on (N: none)."""
    marks = is_landmark.long()
    places = torch.arange(marks.shape[1], device=marks.device).expand_as(marks)
    following = torch.where(marks != 0, places, marks.shape[1]).flip(1).cummin(1).values.flip(1)
    before, after = table(marks.cumsum(1) - marks), table(following)
    return (lambda b, j: before[b, j]), (lambda b, j: after[b, j])
