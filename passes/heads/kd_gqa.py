"""Fewer key heads, and query heads given to them by how long their keys are (KDGQA, DGQA, PGQA, arXiv 2408.08454)."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...compiler.functional import attention
from ...compiler.live import KEPT
from ...compiler.mechanism import Aux, Limit, Mechanism, Param, register
from ...compiler.primitives.attend import attend
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.site import Site

VARIANTS = ("gqa", "kdgqa", "dgqa", "pgqa")
METHODS = ("mean", "first", "random")
CHANGES = ("ema", "diff")


@register("kd_gqa")
@dataclass(frozen=True)
class KdGqa(Mechanism):
    """Query head h reads key head g(h): an allocation a_1 .. a_G, sum a = H, gives each key head a run of query heads.

    num_kv_heads  G: key and value heads are first joined, H_kv / G consecutive ones each: their mean, the first, or
                  one at random (drawn once). The mean of projections is the projection by the mean: variant gqa
                  leaves by export("hf") with W_k and W_v shrunk. None: the heads there are.
    gqa           a = H / G.
    kdgqa         from the batch, at noncausal sites: n_g = sum_b ||k_bg||_F, t = (n - min) / (max - min),
                  a = round(t / sum t * H), then one less at the largest or one more at the smallest until it sums to H.
                  The weakest key head gets no query unless one is left over. Equal norms: H / G.
    dgqa          the buffer `allocation`, made anew in training at every window_size-th step for the steps behind it:
                  a = round(u / sum u * H), u = beta n + (1 - beta) cache (ema) or |cache - n| (diff; the knob is
                  `change`, or the paper's `kind`), cache <- (cache + n) / window_size. Frozen otherwise. at_once does
                  as the reference: the new one is used in the same forward, and in eval() every forward makes one,
                  with cache <- n (handed out; buffers are kept in train() alone). The reference mends a's sum at random
                  heads; here it is done as in kdgqa.
    pgqa          gqa, then from every group's output noise of the same row means and deviations is taken away (also at
                  test time): a case study of the paper.

    >>> q, k, v = problem(5)
    >>> k[:, 1] *= 9                                # norms of about 1, 9, 1, 1
    >>> o = attention(q, k, v, "kd_gqa", variant="kdgqa")
    >>> bool((o - attention(q, k[:, 1:2], v[:, 1:2], "softmax")).abs().max() < 1e-6)
    True
    """

    num_kv_heads: int | None = None
    variant: str = "gqa"
    method: str = "mean"
    change: str = "ema"
    beta: float = 0.9
    window_size: int = 1
    at_once: bool = False

    part = "core"
    kind = "needs recovery"
    honours = KEPT
    paper = "arXiv 2408.08454"
    also = {"kind": "change"}
    heads_alike = False  # consecutive heads form a group
    heads_apart = False
    tries = ({"num_kv_heads": 2}, {"num_kv_heads": 1, "method": "random"})  # dgqa: buffers, that nothing learns

    def __post_init__(self) -> None:
        chosen = {"variant": VARIANTS, "method": METHODS, "change": CHANGES}
        for knob, known in chosen.items():
            if getattr(self, knob) not in known:
                raise Refused(f"{knob}={getattr(self, knob)!r}", where="kd_gqa", fits=f"one of {', '.join(known)}")
        if self.window_size < 1:
            raise Refused(f"window_size={self.window_size}", where="kd_gqa", fits="window_size >= 1")
        if self.num_kv_heads is not None and self.num_kv_heads < 1:
            raise Refused(f"num_kv_heads={self.num_kv_heads}", where="kd_gqa", fits="at least 1, or none")

    def fits(self, site: Site) -> str | None:
        if site.kv_heads % self._groups(site):
            return f"num_kv_heads={self.num_kv_heads} does not divide the {site.kv_heads} key heads of this site"
        if site.causal and (self.variant == "kdgqa" or self.at_once):
            return "norms over all keys look ahead on a causal site: dgqa with its frozen allocation"
        return None

    def _groups(self, site: Any) -> int:
        return int(self.num_kv_heads or site.kv_heads)

    def key_heads(self, site: Site) -> int | None:
        return self._groups(site) if self.variant == "gqa" else None

    def picked(self, groups: int, size: int) -> tuple[int, ...] | None:
        draw = random.Random(0)
        if self.method == "mean":
            return None
        return tuple(draw.randrange(size) if self.method == "random" else 0 for _ in range(groups))

    def buffers(self, site: Site) -> Mapping[str, Param]:
        if self.variant != "dgqa":
            return {}
        G = self._groups(site)
        even = Param((G,), lambda t: t.fill_(site.heads // G), torch.long)
        return {"cache": Param((G,), dtype=torch.float32), "allocation": even, "step": Param((1,), dtype=torch.long)}

    def forward(
        self,
        site: Any,
        p: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding: Tensor | None = None,
        train: Tensor | None = None,
    ) -> Any:
        k, v = self._joined(k), self._joined(v)
        if self.variant in ("gqa", "pgqa"):
            o: Tensor = attend(q, k, v, site=site)
            return o if self.variant == "gqa" else _perturbed(o, k.shape[1])
        heads, n = q.shape[1], _norms(k, key_padding)
        if self.variant == "kdgqa":
            return attend(q, k, v, kv_heads=_owners(allocated(_above_least(n), heads), heads), site=site)
        fresh = allocated(
            self.beta * n + (1 - self.beta) * p.cache if self.change == "ema" else (p.cache - n).abs(), heads
        )
        if self.at_once and train is None:
            after = {"allocation": fresh, "cache": n, "step": p.step}
        else:
            due = p.step % self.window_size == 0
            after = {
                "allocation": torch.where(due, fresh, p.allocation),
                "cache": torch.where(due, (p.cache + n) / self.window_size, p.cache),
                "step": p.step + 1,
            }
        a = after["allocation"] if self.at_once else p.allocation
        return attend(q, k, v, kv_heads=_owners(a, heads), site=site), Aux(buffers=after)

    def _joined(self, t: Tensor) -> Tensor:
        """(B, G, M, D) of (B, Hkv, M, D)."""
        G = self.num_kv_heads or t.shape[1]
        if t.shape[1] == G:
            return t
        groups = t.unflatten(1, (G, -1))
        picked, size = self.picked(G, groups.shape[2]), groups.shape[2]
        return groups.mean(2) if picked is None else t[:, [g * size + one for g, one in enumerate(picked)]]

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(7)
        k2, v2 = (t[:, ::2].repeat_interleave(2, 1) for t in (k, v))
        yield Limit("as many heads as there are is softmax", lambda: attention(q, k, v, KdGqa()),
                    lambda: attention(q, k, v, "softmax"))  # fmt: skip
        for method in METHODS:
            yield Limit(f"equal heads within a group are joined without loss ({method})",
                        lambda m=method: attention(q, k2, v2, KdGqa(2, method=m)),  # type: ignore[misc]
                        lambda: attention(q, k[:, ::2], v[:, ::2], "softmax"))  # fmt: skip
        yield Limit("a fresh allocation is plain grouping", lambda: attention(q, k, v, KdGqa(2, "dgqa")),
                    lambda: attention(q, k, v, KdGqa(2)))  # fmt: skip
        alike = k[:, :1].expand_as(k)
        yield Limit("equal norms share out evenly", lambda: attention(q, alike, v, KdGqa(None, "kdgqa")),
                    lambda: attention(q, alike, v, "softmax"))  # fmt: skip


def allocated(u: Tensor, heads: int) -> Tensor:
    """(G,) whole numbers that sum to `heads`, in proportion to u; the first index counts among equals.

    >>> allocated(torch.tensor([1.0, 2.0, 5.0]), 12), allocated(torch.zeros(4), 8)
    (tensor([2, 3, 7]), tensor([2, 2, 2, 2]))
    """
    count = u.shape[0]
    total = u.sum()
    share = torch.where(total > 0, u / torch.where(total > 0, total, 1.0) * heads, heads / count)
    a = share.round().long()  # half to even
    place = torch.arange(count, device=u.device)
    for _ in range(count // 2 + 1):  # each entry was rounded by at most a half
        excess = a.sum() - heads
        a = a - ((excess > 0) & (place == a.argmax())).long() + ((excess < 0) & (place == a.argmin())).long()
    return a


def _norms(k: Tensor, key_padding: Tensor | None) -> Tensor:
    """(G,): Frobenius norms over tokens and channels, summed over the batch; hidden keys do not count."""
    squares = k.detach().to(torch.promote_types(k.dtype, torch.float32)).square().sum(-1)  # (B, G, M)
    if key_padding is not None:
        squares = squares * key_padding[:, None]
    return squares.sum(-1).sqrt().sum(0).float()


def _above_least(n: Tensor) -> Tensor:
    span = n.max() - n.min()
    return (n - n.min()) / torch.where(span > 0, span, 1.0)


def _owners(a: Tensor, heads: int) -> Tensor:
    """(H,): the key head of every query head, in runs."""
    return torch.searchsorted(a.cumsum(0), torch.arange(heads, device=a.device), right=True)


def _perturbed(o: Tensor, groups: int) -> Tensor:
    """o minus uniform noise without its main diagonal, its rows with the mean and the deviation of o's rows."""
    rows = o.unflatten(1, (groups, -1)).flatten(3).to(torch.promote_types(o.dtype, torch.float32))  # (B, G, H/G, N*D)
    noise = torch.rand(rows.shape[1:], dtype=rows.dtype, device=rows.device)
    across, along = (torch.arange(s, device=o.device) for s in noise.shape[1:])
    noise = torch.where(across[:, None] == along, 0.0, noise)
    spread = noise.std(-1, keepdim=True)
    noise = (noise - noise.mean(-1, keepdim=True)) / torch.where(spread > 0, spread, 1.0)
    like = noise * rows.std(-1, keepdim=True) + rows.mean(-1, keepdim=True)
    return (rows - like).to(o.dtype).reshape(o.shape)
