"""Combiner: near tokens one by one, and every other token within a span that one key stands for (arXiv 2107.05768)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from ...compiler.functional import attention
from ...compiler.mechanism import Limit, Mechanism, Param, register
from ...compiler.primitives.attend import Segment, attend
from ...compiler.primitives.gather import gather
from ...compiler.primitives.group import group
from ...compiler.primitives.prefix import prefix
from ...compiler.primitives.rows import repeat_heads
from ...compiler.problem import hidden, problem
from ...compiler.refusal import Refused
from ...compiler.site import Site
from ...compiler.starts import constant, eye, normal
from ...compiler.symbols import table

VARIANTS = ("fixed", "logsparse", "axial_mixture", "axial_mixture_bidir", "axial_rowmajor")
ACTS = ("identity", "relu", "deepset")
POOLS = ("max", "mean", "sum", *(f"{act}-{pool}" for act in ACTS for pool in ("max", "mean", "sum")))
Summary = tuple[Tensor, Tensor]  # a key and a value for each span
State = Mapping[str, Tensor]


@register("combiner")
@dataclass(frozen=True)
class Combiner(Mechanism):
    """One softmax over tokens j and spans Z, o_i = sum_j p_j v_j + sum_Z p_Z V_Z; every token is in one of them.

    A span has the key K_Z = max_z k_z (channel by channel) and the value V_Z = sum_z softmax_z(scale q_Z . k_z) v_z,
    q_Z = max_z q_z; it counts as one key. Tokens stand in rows of seg_len, i = r seg_len + u:

    fixed                tokens of the own row; all rows before (noncausal: all rows) are spans.
    logsparse            the own token; the binary decomposition of all before it. Its length must be known.
    axial_mixture        own row so far and own column above; the other columns above, and of each row above what is
                         left and what is right of the own column, are spans (causal).
    axial_mixture_bidir  own row and own column (the own token in both); all columns above and below, and of each row
                         what is left and what is right, are spans where they are not empty (noncausal).
    axial_rowmajor       own row so far; one key per row above, learned: with y the attention within that row,
                         k = LN(x + y row_out_weight) row_key_weight at the own column, and y as its value (causal).

    summary_pool: mean and sum pool k and q otherwise (the axial variants know max and sum), relu-... after a relu,
    deepset-... after relu(x W) with learned W (D, D), one for q and one for k.
    count_empty: in the bidirectional mixture a part that is empty counts too, with the key 0 and the mean of its line's
    values, as in the paper's code.
    short_levels: with 2^k + 1 tokens the paper's logsparse leaves out level k, and its last token sees only itself.

    >>> q, k, v = problem(9)
    >>> alone = attention(q, k, v, "combiner", causal=True, seg_len=1)  # spans of one token
    >>> bool((alone - attention(q, k, v, "softmax", causal=True)).abs().max() < 1e-6)
    True
    """

    variant: str = "fixed"
    seg_len: int = 64
    summary_pool: str = "max"
    count_empty: bool = False
    short_levels: bool = False

    part = "core"
    kind = "needs recovery"
    honours = frozenset[str]()
    paper = "arXiv 2107.05768"
    tries = (
        {"seg_len": 3},
        {"seg_len": 3, "summary_pool": "deepset-mean"},
        {"variant": "logsparse"},
        {"variant": "axial_mixture", "seg_len": 3},
        {"variant": "axial_mixture_bidir", "seg_len": 3, "summary_pool": "sum"},
        {"variant": "axial_rowmajor", "seg_len": 3},
    )

    @property
    def heads_apart(self) -> bool:  # type: ignore[override]
        """The keys of rows are learned from all heads together."""
        return self.variant != "axial_rowmajor"

    heads_alike = heads_apart

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS or self.summary_pool not in POOLS or self.seg_len < 1:
            found = f"variant={self.variant!r}, summary_pool={self.summary_pool!r}, seg_len={self.seg_len}"
            raise Refused(found, where="combiner", fits=f"variants {VARIANTS}, pools {POOLS}, seg_len at least 1")
        if self.variant.startswith("axial_mixture") and self.summary_pool.removeprefix("identity-") not in (
            "max",
            "sum",
        ):
            raise Refused(
                f"summary_pool={self.summary_pool!r} with {self.variant}", where="combiner", fits="max or sum"
            )

    def fits(self, site: Site) -> str | None:
        if not site.self_attention or site.queries != site.keys:
            return "combiner summarises the tokens of one sequence, of which all queries must be there"
        if self.variant != "fixed" and site.causal == (self.variant == "axial_mixture_bidir"):
            return f"combiner {self.variant} is {'non' if site.causal else ''}causal, this site is {site.pattern}"
        if self.variant == "axial_rowmajor" and not site.width:
            return "combiner axial_rowmajor needs the width of x, which is not known here"
        return None

    def wanted_ports(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (("q", "k", "v", "x") if self.variant == "axial_rowmajor" else ("q", "k", "v")), ()

    @property
    def _deepset(self) -> bool:
        return self.summary_pool.startswith("deepset") and self.variant in ("fixed", "logsparse")

    def params(self, site: Site) -> Mapping[str, Param]:
        if self._deepset:
            return {name: Param((site.dim, site.dim), eye) for name in ("deepset_query_weight", "deepset_key_weight")}
        if self.variant != "axial_rowmajor":
            return {}
        heads, width = site.heads, site.width
        return {
            "row_out_weight": Param((heads, site.v_dim, width), normal(0.02)),
            "row_ln_weight": Param((width,), constant(1.0)),
            "row_ln_bias": Param((width,)),
            "row_key_weight": Param((width, heads, site.dim), normal(0.02)),
        }

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor | None = None) -> Tensor:
        k, v, size = repeat_heads(k, q), repeat_heads(v, q), self.seg_len
        if self.variant == "logsparse":
            return self._logsparse(site.scale, p, q, k, v)
        keep, segments = _same_row(size), []
        if self.variant == "fixed":
            count = (k.shape[2] + size - 1) // size
            numbers = torch.arange(count, device=k.device)[:, None] * size + torch.arange(size, device=k.device)
            before = (lambda i, j: j < i // size) if site.causal else None
            segments = [Segment(*self._summaries(site.scale, p, q, k, v, numbers), keep=before)]
        elif self.variant == "axial_rowmajor":
            assert x is not None
            above = lambda i, j: (j // size < i // size) & (j % size == i % size)
            segments = [Segment(*self._of_rows(site.scale, p, q, k, v, x), keep=above)]
        else:
            segments = self._mixed(site, q, k, v)
            keep = keep if not site.causal else lambda i, j: (j // size == i // size) | (j % size == i % size)
        return attend(q, k, v, keep=keep, segments=segments, site=site)

    def state(self, site: Any, q: Tensor) -> State:
        if self.variant != "fixed":
            fits = "variant='fixed': the others need every key again"
            raise Refused(f"variant={self.variant!r}", where="combiner: decode", fits=fits)
        none, values = q[:, :, :0], q.new_zeros((*q.shape[:2], 0, site.v_dim))
        raw = {"q": none, "k": none, "v": values}
        return {"span_k": none, "span_v": values, **raw, "seen": torch.zeros((), dtype=torch.long)}

    def prefill(self, site: Any, p: Any, state: State, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, State]:
        """The state is a key and a value for each row that is full, and the open row as it came."""
        size, seen = self.seg_len, int(state["seen"])
        old, total = state["span_k"].shape[2], seen + q.shape[2]
        rows = (("q", q), ("k", repeat_heads(k, q)), ("v", repeat_heads(v, q)))
        raw = {name: torch.cat((state[name], t), 2) for name, t in rows}
        spans, full = (state["span_k"], state["span_v"]), total // size - old
        if full:
            numbers = torch.arange(full * size, device=q.device).view(full, size)
            made = self._summaries(site.scale, p, raw["q"], raw["k"], raw["v"], numbers)
            spans = torch.cat((spans[0], made[0]), 2), torch.cat((spans[1], made[1]), 2)
        first = old * size
        own = lambda i, j: (j + first <= i + seen) & ((j + first) // size == (i + seen) // size)
        segments = [Segment(*spans, keep=lambda i, j: j < (i + seen) // size)] if old + full else []
        o = attend(q, raw["k"], raw["v"], scale=site.scale, keep=own, segments=segments)
        left = {name: t[:, :, full * size :] for name, t in raw.items()}
        return o, {"span_k": spans[0], "span_v": spans[1], **left, "seen": torch.tensor(total)}

    step = prefill

    def _summaries(self, scale: float, p: Any, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Summary:
        """K_Z and V_Z of the spans that row numbers (G, S) list; -1 and beyond: no row."""
        act, _, pool = self.summary_pool.rpartition("-")
        dim = k.shape[-1]
        rows, held = group(torch.cat((q, k, v), -1), numbers)  # (B, H, G, S, D + D + Dv)
        both = rows[..., : 2 * dim]
        if self._deepset:
            both = both @ torch.block_diag(p.deepset_query_weight, p.deepset_key_weight).to(both.dtype)
        pooled = _pooled(both if act in ("", "identity") else both.relu(), held, pool)
        real = table(held.flatten(1, 2))
        o = attend(
            pooled[..., :dim].flatten(1, 2).unsqueeze(2),
            rows[..., dim : 2 * dim].flatten(1, 2),
            rows[..., 2 * dim :].flatten(1, 2),
            scale=scale,
            keep=lambda b, h, j: real[b, h, j],
        )
        # -1: one span here may be many at another length
        return pooled[..., dim:], o.squeeze(2).unflatten(1, (rows.shape[1], -1))

    def _logsparse(self, scale: float, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each query names its rows: itself, and for every bit of i the span that the bit stands for."""
        n = k.shape[2]
        if not isinstance(n, int):
            raise Refused(f"{n} tokens, an open number", where="combiner logsparse", fits="a known length")
        i, keys, values, first = torch.arange(n, device=k.device), [k], [v], 0
        rows = [i]
        if self.summary_pool.startswith(("relu", "deepset")):  # then a span of one token has another key than the token
            key, value = self._summaries(scale, p, q, k, v, i[:, None])
            keys.append(key)
            values.append(value)
            first = n
        levels = (n - 1).bit_length() - int(self.short_levels and n > 2 and (n - 1).bit_count() == 1)
        for level in range(levels):
            rows.append(torch.where((i >> level) & 1 == 1, first + (i >> level) - 1, -1))
            first += n >> level
            size = 2 ** (level + 1)
            if n >= size:
                spans = torch.arange(n // size * size, device=k.device).view(-1, size)
                key, value = self._summaries(scale, p, q, k, v, spans)
                keys.append(key)
                values.append(value)
        return attend(q, torch.cat(keys, 2), torch.cat(values, 2), scale=scale, rows=torch.stack(rows, -1)[None, None])

    def _of_rows(self, scale: float, p: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Summary:
        y = attend(q, k, v, scale=scale, keep=_same_row(self.seg_len))
        mixed = x + torch.einsum("bhnd,hdf->bnf", y, p.row_out_weight)
        mixed = layer_norm(mixed, mixed.shape[-1:], p.row_ln_weight, p.row_ln_bias, 1e-6)
        return torch.einsum("bnf,fhd->bhnd", mixed, p.row_key_weight), y

    def _mixed(self, site: Any, q: Tensor, k: Tensor, v: Tensor) -> list[Segment]:
        """What each token sees of the lines through others: at token j stands the part of its line that ends there."""
        size = self.seg_len

        def lines(along: str, *, back: bool = False) -> Summary:
            return self._running(site.scale, q, k, v, *_lines(k, size, along, back))

        if site.causal and size == 1:  # a row has nothing beside its token
            return []
        left, right = lines("row"), lines("row", back=True)
        if site.causal:
            others = lambda i, j: (j // size + 1 == i // size) & (j % size != i % size)
            return [
                Segment(*lines("column"), keep=others),
                Segment(*left, keep=lambda i, j: (j // size < i // size) & (j % size + 1 == i % size)),
                Segment(*right, keep=lambda i, j: (j // size < i // size) & (j % size == i % size + 1)),
            ]
        above_and_below = [
            Segment(k, v, keep=lambda i, j: j % size == i % size),
            Segment(*lines("column"), keep=lambda i, j: j // size + 1 == i // size),
            Segment(*lines("column", back=True), keep=lambda i, j: j // size == i // size + 1),
        ]
        beside = [
            Segment(*left, keep=lambda i, j: j % size + 1 == i % size),
            Segment(*right, keep=lambda i, j: j % size == i % size + 1),
        ]
        return above_and_below + (beside if size > 1 else []) + (self._empty(k, v) if self.count_empty else [])

    def _empty(self, k: Tensor, v: Tensor) -> list[Segment]:
        """The parts of lines that hold nothing, above, below, left and right of a token's own row and column."""
        size, found = self.seg_len, []
        nothing: dict[str, tuple[Any, Any]] = {
            "column": (lambda i, j: i < size, lambda i, j, N: (i // size + 1) * size + j >= N),
            "row": (
                lambda i, j: i % size == 0,
                lambda i, j, N: (i % size == size - 1) | (j * size + i % size + 1 >= N),
            ),
        }
        for along, (before, after) in nothing.items():
            means, _ = group(v, _lines(k, size, along, back=False)[0], combine="mean")
            zeros = torch.zeros_like(means[..., :1]).expand(*means.shape[:3], k.shape[-1])
            found += [Segment(zeros, means, keep=before), Segment(zeros, means, keep=after)]
        return found

    def _running(self, scale: float, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor, place: Tensor) -> Summary:
        """The summary of every line up to each of its tokens, at the token."""
        rows = group(torch.cat((q, k, v), -1), numbers)[0].flatten(1, 2)  # (B, H * lines, T, D + D + Dv)
        dim = k.shape[-1]
        pooled = prefix(self.summary_pool.removeprefix("identity-"), rows[..., : 2 * dim])
        o = attend(pooled[..., :dim], rows[..., dim : 2 * dim], rows[..., 2 * dim :], scale=scale, causal=True)
        found = torch.cat((pooled[..., dim:], o), -1).unflatten(1, (k.shape[1], -1)).flatten(2, 3)
        key, value = gather(found, place).split([dim, v.shape[-1]], -1)
        return key, value

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(12)
        causal = lambda: attention(q, k, v, "softmax", causal=True)
        yield Limit(
            "one row is causal attention", lambda: attention(q, k, v, Combiner(seg_len=12), causal=True), causal
        )
        for variant in ("fixed", "axial_mixture"):
            alone = Combiner(variant, 1)
            yield Limit(f"rows of one token too ({variant})", partial(attention, q, k, v, alone, causal=True), causal)
        flat, ports = v[:, :, :1].expand_as(v), {"x": hidden(12)}
        for variant in VARIANTS:
            same, before = Combiner(variant, 5), variant != "axial_mixture_bidir"
            run = partial(attention, q, k, flat, same, causal=before, ports=ports)
            yield Limit(f"a constant v comes out ({variant})", run, lambda: flat)
        a, b, c = (t[:, :, ::3] for t in (q, k, v))
        yield Limit(
            "a span of equal tokens is one of them, counted once",
            lambda: attention(_thrice(a), _thrice(b), _thrice(c), Combiner(seg_len=3), causal=True)[:, :, ::3],
            lambda: attention(a, b, c, "softmax", causal=True),
        )


def _thrice(t: Tensor) -> Tensor:
    return t.repeat_interleave(3, 2)


def _same_row(size: int) -> Callable[..., Any]:
    return lambda i, j: j // size == i // size


def _pooled(rows: Tensor, held: Tensor, pool: str) -> Tensor:
    """rows (B, H, G, S, D) as one each (B, H, G, D), over the slots that hold something."""
    if pool == "max":
        return rows.masked_fill(~held[..., None], -math.inf).amax(-2)
    total = (rows * held[..., None]).sum(-2)
    return total / held.sum(-1, keepdim=True) if pool == "mean" else total


def _lines(k: Tensor, size: int, along: str, back: bool) -> tuple[Tensor, Tensor]:
    """The tokens of each row or column in order (lines, T), -1 behind the last, and each token's place in that list."""
    n = k.shape[2]
    token, height = torch.arange(n, device=k.device), (n + size - 1) // size
    row, column = token // size, token % size
    lines, length = (size, height) if along == "column" else (height, size)
    line, step = (column, row) if along == "column" else (row, column)
    if back:
        last = (n - 1 - column) // size if along == "column" else (n - 1 - row * size).clamp(max=size - 1)
        step = last - step
    place = line * length + step
    none = torch.full((lines * length,), -1, dtype=torch.long, device=k.device)
    return none.scatter(0, place, token).view(lines, length), place
