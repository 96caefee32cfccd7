"""HyperAttention: blocks of keys and queries that hash alike, and sampled keys for all the rest (arXiv 2310.05869)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...compiler.functional import attention
from ...compiler.mechanism import Limit, Mechanism, Param, register
from ...compiler.primitives.attend import Tiles, attend
from ...compiler.primitives.gather import gather
from ...compiler.primitives.merge import merge
from ...compiler.primitives.rows import repeat_heads
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.site import Site
from ...compiler.starts import normal
from ...compiler.symbols import table

Part = tuple[Tensor, Tensor]  # (o, lse)
TURN = (math.sqrt(5) - 1) / 2  # a rotation by it spreads one set of uniform draws over many calls


@register("hyper")
@dataclass(frozen=True)
class Hyper(Mechanism):
    """Rows sorted by hash(x) = gray[bits of x . lsh_proj > 0]; query block t sees key block t and sample_size keys.

    o = merge(softmax within the block, softmax over the sampled keys with lse + log(M / sample_size)), exact below
    min_seq_len. Causal: the sequence is halved until min_seq_len is reached, and each second half sees its first half
    in this way. The reference ranks the queries of a half among one another, by which later ones are seen: here a
    query of a causal site is ranked among the queries of the first half; ranked_queries=True does as the reference.

    sample_size keys are drawn per head and call, or given by the port sample_idx (B, H, S) of places in the sorted
    order (causal: of all halves that sample, along the heads, the deepest first, (B, H * 2^depth, S) each).
    mask_block_samples=False counts a sampled key of the own block twice, as the reference does in float32;
    pad_keys_visible=True counts the zeros behind the last block as keys, as the reference does.
    How often to halve is read off the length, so that it must be known: open sizes are refused.

    >>> q, k, v = problem(8)
    >>> sure = attention(q, k, v, "hyper", block_size=8, min_seq_len=1)  # one block holds everything
    >>> bool((sure - attention(q, k, v, "softmax")).abs().max() < 1e-6)
    True
    """

    lsh_num_projs: int = 7
    block_size: int = 256
    sample_size: int = 256
    min_seq_len: int = 4096
    mask_block_samples: bool = True
    pad_keys_visible: bool = False
    ranked_queries: bool = False

    part = "core"
    kind = "approximate"
    honours = frozenset[str]()
    paper = "arXiv 2310.05869"
    heads_alike = False  # each has draws of its own
    tries = (
        {},
        {"lsh_num_projs": 3, "block_size": 2, "sample_size": 3, "min_seq_len": 3},
        {"lsh_num_projs": 2, "block_size": 3, "sample_size": 0, "min_seq_len": 2},
    )

    def __post_init__(self) -> None:
        if min(self.block_size, self.min_seq_len, self.lsh_num_projs) < 1 or self.sample_size < 0:
            found = f"{self.lsh_num_projs=}, {self.block_size=}, {self.sample_size=}, {self.min_seq_len=}"
            raise Refused(found.replace("self.", ""), where="hyper", fits="all at least 1, sample_size at least 0")
        if self.lsh_num_projs > 62:
            fits = "at most 62: a code is as many bits of an int64"
            raise Refused(f"lsh_num_projs={self.lsh_num_projs}", where="hyper", fits=fits)

    def fits(self, site: Site) -> str | None:
        if site.causal and not site.self_attention:
            return f"hyper halves one sequence, this site is {site.pattern}"
        if site.queries and not site.queries.isdigit():
            return f"hyper needs sequences of one known length, this site has {site.queries} queries"
        if site.queries.isdigit() and site.keys.isdigit() and not site.causal:
            return self._ragged(int(site.queries), int(site.keys))
        return None

    def _ragged(self, n: int, m: int) -> str | None:
        """Queries fall into as many blocks as keys."""
        padded, blocks = self._up(n), self._up(m) // self.block_size
        if n < self.min_seq_len or padded % blocks == 0:
            return None
        return f"{n} queries, padded to {padded}, do not fall into the {blocks} blocks of {m} keys"

    def _up(self, n: int) -> int:
        return -(-n // self.block_size) * self.block_size

    def buffers(self, site: Site) -> Mapping[str, Param]:
        count = self.lsh_num_projs
        return {
            "lsh_proj": Param((1, 1, site.dim, count), normal(1.0), torch.float32),
            "gray": Param((2**count,), lambda t: t.copy_(_gray(count)), torch.long),
        }

    def draws(self, site: Site) -> Mapping[str, Param]:
        shape = (site.heads, self.sample_size)
        return {"uniform": Param(shape, torch.Tensor.uniform_, torch.float32)} if self.sample_size else {}

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor, sample_idx: Tensor | None = None) -> Tensor:
        if not isinstance(q.shape[2], int) or not isinstance(k.shape[2], int):
            raise Refused(f"{q.shape[2]} queries, an open number", where="hyper", fits="sequences of one known length")
        run = _Run(self, p, site.scale, sample_idx)
        k, v = repeat_heads(k, q), repeat_heads(v, q)
        return (run.causal(q, k, v) if site.causal else run.block_and_sample(q, k, v))[0]

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(8)
        once = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(s)) for s in range(8)])
        whole, half = once.view(2, 4, 8), once.argsort(1).view(2, 4, 8)[..., :4].argsort(-1)
        for says, same, samples, causal in (
            ("min_seq_len > n is full attention", Hyper(), None, False),
            ("min_seq_len > n is causal attention", Hyper(), None, True),
            ("one block is full attention", Hyper(block_size=8, min_seq_len=1), None, False),
            ("every key sampled once is full attention", Hyper(3, 3, 8, 1), whole, False),
            ("every key sampled once is causal attention", Hyper(3, 2, 4, 4), half, True),
        ):
            ports = {} if samples is None else {"sample_idx": samples}
            got = partial(attention, q, k, v, same, causal=causal, ports=ports)
            yield Limit(says, got, partial(attention, q, k, v, "softmax", causal=causal))
        flat = v[:, :, :1].expand_as(v)
        yield Limit("a constant v comes out", lambda: attention(q, k, flat, Hyper(3, 2, 3, 2)), lambda: flat)


class _Run:
    """One forward: the hash, and the samples of one call after another."""

    def __init__(self, how: Hyper, p: Any, scale: float, sample_idx: Tensor | None) -> None:
        self.how, self.p, self.scale, self.sample_idx = how, p, scale, sample_idx
        self.calls = self.heads_taken = 0

    def causal(self, q: Tensor, k: Tensor, v: Tensor) -> Part:
        n = q.shape[2]
        if n <= self.how.min_seq_len:
            return self._exact(q, k, v, causal=True)
        q, k, v = (pad(t, (0, 0, 0, n % 2)) for t in (q, k, v))
        half = q.shape[2] // 2
        o, lse = self.causal(*(t.unflatten(2, (2, half)).flatten(1, 2) for t in (q, k, v)))
        o, lse = (t.unflatten(1, (q.shape[1], 2)) for t in (o, lse))  # (B, H, 2, half, D), (B, H, 2, half)
        past = None if self.how.ranked_queries else q[:, :, :half]
        far = self.block_and_sample(q[:, :, half:], k[:, :, :half], v[:, :, :half], past)
        late, late_lse = merge([(o[:, :, 1], lse[:, :, 1]), far])
        return torch.cat((o[:, :, 0], late), 2)[:, :, :n], torch.cat((lse[:, :, 0], late_lse), 2)[:, :, :n]

    def block_and_sample(self, q: Tensor, k: Tensor, v: Tensor, past: Tensor | None = None) -> Part:
        """All keys as seen by all queries; `past`: queries among which these ones are ranked, else one another."""
        if q.shape[2] < self.how.min_seq_len:
            return self._exact(q, k, v)
        order = _sorted(self._hash(k))
        k, v = gather(k, order), gather(v, order)
        if past is not None:
            place = self._places(q, past)
            near = attend(
                q, k, v, scale=self.scale, tiles=Tiles(place[..., None], 1, self.how.block_size), outputs=("o", "lse")
            )
            places = table(place)
            return self._with_samples(q, k, v, near, lambda b, h, i: places[b, h, i])
        order = _sorted(self._hash(q))
        q, back = gather(q, order), order.argsort(2)
        size = self._query_block(q.shape[2], k.shape[2])
        o, lse = self._with_samples(q, k, v, self._diagonal(q, k, v, size), lambda b, h, i: i // size)
        return gather(o, back), lse.gather(2, back)

    def _places(self, q: Tensor, past: Tensor) -> Tensor:
        """The key block of each query (B, H, N): its hash's place among those of the past, spread where many agree."""
        known = _sorted_values(self._hash(past))
        own, n, size = self._hash(q).contiguous(), q.shape[2], self.how.block_size
        first, last = (torch.searchsorted(known, own, right=right) for right in (False, True))
        place = first + (last - first) * torch.arange(n, device=q.device) // n
        return (place // size).clamp(max=(past.shape[2] - 1) // size)

    def _query_block(self, n: int, m: int) -> int:
        ragged = self.how._ragged(n, m)
        if ragged:
            raise Refused(ragged, where="hyper", fits="as many queries as keys")
        return self.how._up(n) * self.how.block_size // self.how._up(m)

    def _diagonal(self, q: Tensor, k: Tensor, v: Tensor, size: int) -> Part:
        """Query block t over key block t, the blocks as heads of their own."""
        n, m, step = q.shape[2], k.shape[2], self.how.block_size
        blocks = self.how._up(m) // step

        def folded(t: Tensor, rows: int) -> Tensor:
            return pad(t, (0, 0, 0, blocks * rows - t.shape[2])).unflatten(2, (blocks, rows)).flatten(1, 2)

        real = None if self.how.pad_keys_visible or m % step == 0 else lambda h, j: h % blocks * step + j < m
        o, lse = attend(
            folded(q, size), folded(k, step), folded(v, step), scale=self.scale, keep=real, outputs=("o", "lse")
        )
        o, lse = (t.unflatten(1, (q.shape[1], blocks)).flatten(2, 3) for t in (o, lse))
        return o[:, :, :n], lse[:, :, :n]

    def _with_samples(self, q: Tensor, k: Tensor, v: Tensor, near: Part, block: Callable[..., Any]) -> Part:
        count, m, step = self.how.sample_size, k.shape[2], self.how.block_size
        if not count or m <= step or q.shape[2] <= self._least_rows(q.shape[2], m):
            return near
        at = self._samples(q, m)
        own = table(at // step)
        keep = (lambda b, h, i, j: own[b, h, j] != block(b, h, i)) if self.how.mask_block_samples else None
        o, lse = attend(q, gather(k, at), gather(v, at), scale=self.scale, keep=keep, outputs=("o", "lse"))
        return merge([near, (o, lse + math.log(m / count))])

    def _least_rows(self, n: int, m: int) -> int:
        return self.how._up(n) * self.how.block_size // self.how._up(m)

    def _samples(self, q: Tensor, m: int) -> Tensor:
        """Places (B, H, S) in 0 .. m - 1, of the next call."""
        batch, heads = q.shape[:2]
        if self.sample_idx is not None:
            taken = self.sample_idx.narrow(1, self.heads_taken, heads)
            self.heads_taken += heads
            return taken
        parts = heads // self.p.uniform.shape[0]  # halves of halves, side by side with their head
        turns = torch.arange(parts, device=q.device) * TURN + self.calls * TURN**2
        self.calls += 1
        drawn = ((self.p.uniform[:, None] + turns[:, None]) % 1.0).flatten(0, 1)
        return (drawn * m).long().clamp(max=m - 1).expand(batch, heads, self.how.sample_size)

    def _hash(self, x: Tensor) -> Tensor:
        """(B, H, N): numbers of buckets, neighbours differ in the side of one plane."""
        wide = torch.promote_types(x.dtype, torch.float32)
        bits = (x.detach().to(wide) @ self.p.lsh_proj.to(wide)) > 0
        return self.p.gray[(bits * 2 ** torch.arange(bits.shape[-1], device=x.device)).sum(-1)]

    def _exact(self, q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Part:
        o, lse = attend(q, k, v, scale=self.scale, causal=causal, outputs=("o", "lse"))
        return o, lse


def _sorted(buckets: Tensor) -> Tensor:
    return buckets.sort(dim=2, stable=True).indices


def _sorted_values(buckets: Tensor) -> Tensor:
    return buckets.sort(dim=2, stable=True).values


def _gray(bits: int) -> Tensor:
    """The reflected binary code, in which the reference looks its buckets up."""
    code = torch.tensor([0, 1])
    for n in range(1, bits):
        code = torch.cat((code, code.flip(0) + 2**n))
    return code
