"""attend against formulas written out densely in float64: every form, values and gradients of all it reads."""

from __future__ import annotations

import doctest
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import softplus

import reattend
from reattend.compiler.live import LiveSite
from reattend.compiler.primitives.attend import Relative, Segment, Tiles, attend
from reattend.compiler.primitives.attend_spec import AttendSpec
from reattend.compiler.refusal import Refused
from reattend.compiler.site import Site
from reattend.compiler.symbols import table

B, H, HKV, N, M, D, DV = 2, 4, 2, 5, 7, 6, 3


@dataclass
class Problem:
    """Random q, k, v in float64, and names for the further tensors a case draws; all of them leaves."""

    n: int = N
    m: int = M
    leaves: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.q, self.k, self.v = self.draw(B, H, self.n, D), self.draw(B, HKV, self.m, D), self.draw(B, HKV, self.m, DV)
        self.i, self.j = torch.arange(self.n)[:, None], torch.arange(self.m)[None, :]

    def draw(self, *shape: int) -> Tensor:
        self.leaves.append(torch.randn(*shape, dtype=torch.float64, requires_grad=True))
        return self.leaves[-1]

    @property
    def kh(self) -> Tensor:
        return self.k.repeat_interleave(H // HKV, 1)

    @property
    def vh(self) -> Tensor:
        return self.v.repeat_interleave(H // HKV, 1)

    @property
    def s(self) -> Tensor:
        return self.q @ self.kh.mT / D**0.5


def soft(logits: Tensor, keep: Tensor | None = None) -> Tensor:
    """Softmax whose empty rows are 0."""
    if keep is not None:
        logits = logits.masked_fill(~keep, -math.inf)
    return torch.nan_to_num(torch.softmax(logits, -1), nan=0.0)


Pair = tuple[Any, Any]  # what attend gives, what the formula gives
CASES: dict[str, Callable[[Problem], Pair]] = {}


def case(make: Callable[[Problem], Pair]) -> Callable[[Problem], Pair]:
    CASES[make.__name__] = make
    return make


@case
def plain(p: Problem) -> Pair:
    return attend(p.q, p.k, p.v), soft(p.s) @ p.vh


@case
def causal_from_the_start(p: Problem) -> Pair:
    return attend(p.q, p.k, p.v, causal=True), soft(p.s, p.j <= p.i) @ p.vh


@case
def causal_to_the_end(p: Problem) -> Pair:
    return attend(p.q, p.k, p.v, causal=True, align="end"), soft(p.s, p.j <= p.i + p.m - p.n) @ p.vh


@case
def window_and_sinks(p: Problem) -> Pair:
    o = attend(p.q, p.k, p.v, causal=True, keep=lambda i, j: (i - j < 2) | (j < 1), align="end")
    i = p.i + p.m - p.n
    return o, soft(p.s, (p.j <= i) & ((i - p.j < 2) | (p.j < 1))) @ p.vh


@case
def padding_with_an_empty_batch(p: Problem) -> Pair:
    valid = torch.rand(B, p.m) < 0.6
    valid[0] = False
    t = table(valid)
    return attend(p.q, p.k, p.v, keep=lambda b, j: t[b, j]), soft(p.s, valid[:, None, None]) @ p.vh


@case
def empty_rows_and_their_lse(p: Problem) -> Pair:
    o, lse = attend(p.q, p.k, p.v, keep=lambda i, j: (j < i) & (i != 3), outputs=("o", "lse"))
    keep = (p.j < p.i) & (p.i != 3)
    masked = p.s.masked_fill(~keep, -math.inf)
    some = keep.any(-1)
    return (o, lse[..., some], lse[..., ~some].exp()), (
        soft(p.s, keep) @ p.vh,
        masked[:, :, some].logsumexp(-1),
        torch.zeros(B, H, int((~some).sum()), dtype=torch.float64),
    )


@case
def softcap_then_alibi(p: Problem) -> Pair:
    slope = p.draw(H)
    t = table(slope)
    o = attend(p.q, p.k, p.v, score=lambda s, h, i, j: torch.tanh(s / 3) * 3 - t[h] * abs(i - j))
    return o, soft(torch.tanh(p.s / 3) * 3 - slope[:, None, None] * (p.i - p.j).abs()) @ p.vh


@case
def bias_of_four_dimensions(p: Problem) -> Pair:
    bias = p.draw(1, H, p.n, p.m)
    t = table(bias)
    return attend(p.q, p.k, p.v, score=lambda s, h, i, j: s + t[0, h, i, j]), soft(p.s + bias) @ p.vh


@case
def bias_by_distance(p: Problem) -> Pair:
    bias = p.draw(H, 5)
    t = table(bias)
    o = attend(p.q, p.k, p.v, score=lambda s, h, i, j: s + t[h, j - i + 2])  # beyond the table: its edge
    return o, soft(p.s + bias[:, (p.j - p.i + 2).clamp(0, 4)]) @ p.vh


@case
def sink_per_head(p: Problem) -> Pair:
    sink = p.draw(H)
    t = table(sink)
    o, lse = attend(p.q, p.k, p.v, sink=lambda h: t[h], outputs=("o", "lse"))
    logits = torch.cat((p.s, sink.view(1, H, 1, 1).expand(B, H, p.n, 1)), -1)
    return (o, lse), (soft(logits)[..., :-1] @ p.vh, logits.logsumexp(-1))


@case
def sum_of_relu_squared_and_a_sink(p: Problem) -> Pair:
    o = attend(
        p.q, p.k, p.v, normaliser="sum", eps=0.5, weight=lambda s: torch.relu(s) ** 2, sink=lambda: 0.7, causal=True
    )
    w = torch.relu(p.s) ** 2 * (p.j <= p.i)
    return o, w / (w.sum(-1, keepdim=True) + 0.7**2 + 0.5) @ p.vh


@case
def sigmoid_with_a_length_per_head(p: Problem) -> Pair:
    bias = p.draw(H)
    t = table(bias)
    o = attend(p.q, p.k, p.v, normaliser="none", weight=lambda s, h: torch.sigmoid(s + t[h]), causal=True)
    return o, torch.sigmoid(p.s + bias[:, None, None]) * (p.j <= p.i) @ p.vh


@case
def stick_breaking(p: Problem) -> Pair:
    """beta_j prod_{t > j} (1 - beta_t), key by key, strictly before the query."""
    o, left = attend(p.q, p.k, p.v, normaliser="stick", keep=lambda i, j: j < i, outputs=("o", "lse"))
    rest = torch.ones(B, H, p.n, dtype=torch.float64)
    weights = []
    for j in reversed(range(p.m)):
        beta = torch.sigmoid(p.s[..., j]) * (j < p.i[:, 0])
        weights.insert(0, rest * beta)
        rest = rest * (1 - beta)
    return (o, left), (torch.stack(weights, -1) @ p.vh, rest.log())


@case
def groups_with_a_leader(p: Problem) -> Pair:
    """Blocks of 3 keys led by their last, as landmark attention does; the query's own block takes part key by key."""
    o, w = attend(
        p.q, p.k, p.v, align="end", normaliser="grouped", outputs=("o", "weights"),
        keep=lambda i, j: (j <= i) & ~((j // 3 == i // 3) & (j % 3 == 2)),
        leader=lambda i, j: torch.where(j // 3 == i // 3, j, j // 3 * 3 + 2),
    )  # fmt: skip
    rows = []
    for n in range(p.n):
        i = n + p.m - p.n
        own = [j for j in range(p.m) if j // 3 == i // 3 and j <= i and j % 3 != 2]
        marks = [3 * g + 2 for g in range(i // 3)]
        first = torch.softmax(p.s[:, :, n, own + marks], -1)
        row = torch.zeros(B, H, p.m, dtype=torch.float64)
        row = row.index_add(-1, torch.tensor(own, dtype=torch.long), first[..., : len(own)])
        for g in range(i // 3):
            inner = torch.softmax(p.s[:, :, n, 3 * g : 3 * g + 2], -1) * first[..., len(own) + g, None]
            row = row.index_add(-1, torch.tensor([3 * g, 3 * g + 1]), inner)
        rows.append(row)
    dense = torch.stack(rows, 2)
    return (o, w), (dense @ p.vh, dense)


@case
def weights_changed_afterwards(p: Problem) -> Pair:
    toeplitz = p.draw(H, 2 * M)
    t = table(toeplitz)
    o = attend(p.q, p.k, p.v, after=lambda w, h, i, j: w * t[h, j - i + M])
    return o, soft(p.s) * toeplitz[:, p.j - p.i + M] @ p.vh


@case
def further_segments(p: Problem) -> Pair:
    k2, v2, k3, v3 = p.draw(B, H, 2, D), p.draw(B, H, 2, DV), p.draw(1, 1, 3, D), p.draw(1, 1, 3, DV)
    before = torch.tensor([-2, -1])  # causal holds in every segment; these stand before all queries
    parts = (Segment(k2, v2, score=lambda s: s + 1.0, positions=before), Segment(k3, v3))
    o, w = attend(p.q, p.k, p.v, causal=True, segments=parts, outputs=("o", "weights"), after=lambda w: w * 2.0)
    logits = torch.cat((p.s, p.q @ k2.mT / D**0.5 + 1, p.q @ k3.mT / D**0.5), -1)
    keep = torch.cat((p.j <= p.i, torch.ones(p.n, 2, dtype=torch.bool), torch.arange(3) <= p.i), -1)
    dense = soft(logits, keep) * 2
    values = torch.cat((p.vh, v2, v3.expand(B, H, 3, DV)), 2)
    return (o, w), (dense @ values, dense)


@case
def moved_positions(p: Problem) -> Pair:
    i, j = torch.randint(0, 9, (p.n,)), torch.randint(0, 9, (B, p.m))
    o = attend(p.q, p.k, p.v, causal=True, q_positions=i, k_positions=j, score=lambda s, i, j: s - 0.1 * (i - j))
    i, j = i[:, None], j[:, None, None]
    return o, soft(p.s - 0.1 * (i - j), j <= i) @ p.vh


@case
def positions_per_head(p: Problem) -> Pair:
    i, j = torch.randint(0, 9, (B, H, p.n)), torch.randint(0, 9, (B, HKV, p.m))
    o = attend(p.q, p.k, p.v, causal=True, q_positions=i, k_positions=j)
    return o, soft(p.s, j.repeat_interleave(2, 1)[:, :, None] <= i[..., None]) @ p.vh


@case
def key_head_table(p: Problem) -> Pair:
    heads = torch.tensor([1, 0, 0, 1])
    o = attend(p.q, p.k, p.v, kv_heads=heads)
    return o, soft(p.q @ p.k[:, heads].mT / D**0.5) @ p.v[:, heads]


@case
def tile_lists(p: Problem) -> Pair:
    lists = torch.tensor([[0, 2, -1], [1, 1, -1], [-1, -1, -1], [0, 1, 2]])[None, None]  # queries 4 and 5 see nothing
    o = attend(p.q, p.k, p.v, causal=True, align="end", tiles=Tiles(lists, 2, 3))
    keep = torch.tensor([[j // 3 in lists[0, 0, i // 2].tolist() for j in range(p.m)] for i in range(p.n)])
    return o, soft(p.s, keep & (p.j <= p.i + p.m - p.n)) @ p.vh


@case
def rows_per_head(p: Problem) -> Pair:
    rows = torch.tensor([[[3, 0, -1, 5], [2, 2, 1, 6]]])
    o, w = attend(p.q, p.k, p.v, causal=True, align="end", rows=rows, outputs=("o", "weights"))
    picked = rows.clamp(min=0).repeat_interleave(2, 1).expand(B, H, 4)
    k, v = (t.gather(2, picked[..., None].expand(B, H, 4, t.shape[-1])) for t in (p.kh, p.vh))
    keep = (rows >= 0).repeat_interleave(2, 1)[:, :, None] & (picked[:, :, None] <= p.i + p.m - p.n)
    dense = soft(p.q @ k.mT / D**0.5, keep)
    return (o, w), (dense @ v, dense)


@case
def rows_per_query(p: Problem) -> Pair:
    rows = torch.randint(-1, p.m, (B, H, p.n, 3))
    bias = p.draw(H, p.m)
    t = table(bias)
    places = torch.randperm(p.m)
    o, mass = attend(
        p.q, p.k, p.v, rows=rows, k_positions=places, score=lambda s, h, j: s + t[h, j], outputs=("o", "colsum")
    )
    at = rows.clamp(min=0)
    logits = p.s.gather(-1, at) + bias[torch.arange(H).view(1, H, 1, 1), places[at]]
    dense = soft(logits, rows >= 0)
    values = p.vh[:, :, None].expand(B, H, p.n, p.m, DV).gather(3, at[..., None].expand(B, H, p.n, 3, DV))
    return (o, mass), ((dense[..., None] * values).sum(3), dense.sum(2))


@case
def relative_rows_of_queries(p: Problem) -> Pair:
    r = p.draw(H, 2 * M, D)
    o = attend(p.q, p.k, p.v, relative=[Relative(r, lambda i, j: j - i + M)])
    return o, soft(p.s + torch.einsum("bhnd,hnmd->bhnm", p.q, r[:, p.j - p.i + M]) / D**0.5) @ p.vh


@case
def relative_rows_of_both(p: Problem) -> Pair:
    """Disentangled: content to position, position to content, each with a factor of its own, and after the softmax."""
    r, t = p.draw(1, 4, D), p.draw(H, 2 * M, D)
    terms = [Relative(r, lambda i, j: i - j + 2), Relative(t, lambda i, j: i - j + M, of="k")]
    o = attend(p.q, p.k, p.v, relative=terms, score=lambda s, r0, r1: s - r1 * 0.1, after=lambda w, r0: w + 0.01 * r0)
    rq = torch.einsum("bhnd,nmd->bhnm", p.q, r[0][(p.i - p.j + 2).clamp(0, 3)])
    rk = torch.einsum("bhmd,hnmd->bhnm", p.kh, t[:, p.i - p.j + M])
    w = soft((p.q @ p.kh.mT + rq + rk) / D**0.5 - rk * 0.1) + 0.01 * rq
    return o, w @ p.vh


@case
def relative_over_rows_per_query(p: Problem) -> Pair:
    rows = torch.randint(0, p.m, (1, H, p.n, 3))
    r, t = p.draw(1, 2 * M, D), p.draw(H, 2 * M, D)
    terms = [Relative(r, lambda i, j: i - j + M), Relative(t, lambda i, j: i - j + M, of="k")]
    o = attend(p.q, p.k, p.v, rows=rows, relative=terms)
    distance = p.i - p.j + M
    s = p.s + torch.einsum("bhnd,nmd->bhnm", p.q, r[0, distance]) / D**0.5
    s = s + torch.einsum("bhmd,hnmd->bhnm", p.kh, t[:, distance]) / D**0.5
    at = rows.expand(B, H, p.n, 3)
    values = p.vh[:, :, None].expand(B, H, p.n, p.m, DV).gather(3, at[..., None].expand(B, H, p.n, 3, DV))
    return o, (soft(s.gather(-1, at))[..., None] * values).sum(3)


@case
def statistics_of_columns_and_rows(p: Problem) -> Pair:
    outputs = ("colsum", "colmean", "colmax", "entropy", "slab:3", "o")
    got = attend(p.q, p.k, p.v, keep=lambda i, j: j <= i, outputs=outputs)
    keep = p.j <= p.i
    w = soft(p.s, keep)
    count = keep.sum(0).clamp(min=1)
    safe = torch.where(w > 0, w, 1.0)
    return got, (w.sum(2), w.sum(2) / count, w.amax(2), -(w * safe.log()).sum(-1), w[:, :, -3:], w @ p.vh)


@case
def softplus_weights_and_their_lse(p: Problem) -> Pair:
    o, lse = attend(p.q, p.k, p.v, normaliser="sum", weight=softplus, outputs=("o", "lse"))
    w = softplus(p.s)
    return (o, lse), (w / w.sum(-1, keepdim=True) @ p.vh, w.sum(-1).log())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("n", "m"), [(N, M), (7, 7)])
def test_values_and_gradients(name: str, n: int, m: int) -> None:
    p = Problem(n, m)
    got, expected = CASES[name](p)
    got, expected = (x if isinstance(x, tuple | list) else (x,) for x in (got, expected))
    probes = [torch.randn_like(e) for e in expected]
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-8)
    mine, theirs = (
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(xs, probes, strict=True)), p.leaves, allow_unused=True)
        for xs in (got, expected)
    )
    for a, b in zip(mine, theirs, strict=True):
        assert b is not None, "the case does not depend on all it draws"
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)


def test_top_columns_lowest_index_first() -> None:
    q, k = torch.ones(1, 1, 2, 1), torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0]).view(1, 1, 5, 1)
    best, o = attend(q, k, k, keep=lambda i, j: j < 3 * i + 2, outputs=("topk:4", "o"))
    assert best[0, 0].tolist() == [[1, 0, -1, -1], [1, 2, 4, 3]]
    assert o.shape == (1, 1, 2, 1)


def test_top_columns_of_few_keys_and_a_slab_of_few_rows() -> None:
    q, k = torch.randn(1, 2, 2, 4), torch.randn(1, 2, 3, 4)
    best, slab, weights = attend(q, k, k, outputs=("topk:5", "slab:4", "weights"))
    assert (best[..., 3:] == -1).all() and (best[..., :3].sort(-1).values == torch.arange(3)).all()
    assert (slab[:, :, :2] == 0).all() and torch.equal(slab[:, :, 2:], weights)


def test_gradient_through_an_empty_row_is_zero_not_nan() -> None:
    q, k, v = (torch.randn(1, 1, 3, 4, requires_grad=True) for _ in range(3))
    bias = table(torch.tensor([[0.0], [-math.inf], [0.0]]).expand(3, 3).contiguous())
    o, lse, h = attend(q, k, v, score=lambda s, i, j: s + bias[i, j], outputs=("o", "lse", "entropy"))
    assert lse[0, 0, 1] == -math.inf and (o[0, 0, 1] == 0).all()
    (o.sum() + torch.where(lse > -math.inf, lse, 0.0).sum() + h.sum()).backward()
    assert all(bool(t.grad.isfinite().all()) for t in (q, k, v) if t.grad is not None)
    assert q.grad is not None and (q.grad[0, 0, 1] == 0).all()


def test_large_logits_do_not_overflow() -> None:
    q, k, v = torch.full((1, 1, 2, 1), 1e3), torch.tensor([1e3, -1e3]).view(1, 1, 2, 1), torch.randn(1, 1, 2, 3)
    torch.testing.assert_close(attend(q, k, v), v[:, :, :1].expand(1, 1, 2, 3))


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Any], str]] = {
    "heads": (lambda q, k, v: attend(q[:, :3], k, v), "3 heads, 2 key"),
    "dimensions": (lambda q, k, v: attend(q[..., :2], k, v), "q has D=2, k has D=6"),
    "lengths": (lambda q, k, v: attend(q, k, v[:, :, :3]), "7 keys, 3 values"),
    "three dimensions": (lambda q, k, v: attend(q[0], k[0], v[0]), r"q of 3 and k, v of \[3, 3\] dimensions"),
    "normaliser": (lambda q, k, v: attend(q, k, v, normaliser="softmx"), "did you mean 'softmax'"),
    "output": (lambda q, k, v: attend(q, k, v, outputs=("ls",)), "did you mean 'lse'"),
    "count": (lambda q, k, v: attend(q, k, v, outputs=("topk",)), "topk:8"),
    "weight": (lambda q, k, v: attend(q, k, v, weight=lambda s: s), "a weight with normaliser 'softmax'"),
    "leader": (lambda q, k, v: attend(q, k, v, leader=lambda j: j), "'softmax' with a leader"),
    "nothing kept": (lambda q, k, v: attend(q, k, v, keep=lambda: False), "keeps no key"),
    "parameter": (lambda q, k, v: attend(q, k, v, keep=lambda i, jj: jj <= i), "keep asks for jj"),
    "align": (lambda q, k, v: attend(q, k, v, align="left"), "start or end"),
    "rows": (lambda q, k, v: attend(q, k, v, rows=torch.zeros(2, 3, dtype=torch.long)), r"rows of shape \(2, 3\)"),
    "tiles": (lambda q, k, v: attend(q, k, v, tiles=Tiles(torch.zeros(1, 1, 1, 2), 2, 3)), "tiles listed for 1 x 2"),
    "relative": (
        lambda q, k, v: attend(q, k, v, relative=[Relative(q[0], lambda i: i, of="v")]),
        "a relative term of 'v'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_would_fit(name: str) -> None:
    p = Problem()
    call, words = REFUSED[name]
    with pytest.raises(Refused, match=words):
        call(p.q.detach(), p.k.detach(), p.v.detach())


@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (1, 1)])
def test_no_queries_no_keys(n: int, m: int) -> None:
    q, k, v = torch.randn(B, H, n, D), torch.randn(B, HKV, m, D), torch.randn(B, HKV, m, DV)
    o, lse, mass, top, best = attend(q, k, v, outputs=("o", "lse", "colsum", "colmax", "topk:2"))
    assert o.shape == (B, H, n, DV) and mass.shape == top.shape == (B, H, m) and best.shape == (B, H, n, 2)
    if m == 0:
        assert (o == 0).all() and (lse == -math.inf).all() and (best == -1).all()


def test_the_page_on_primitives_runs() -> None:
    page = Path(reattend.__file__).resolve().parent / "docs" / "primitives.md"
    found = doctest.testfile(str(page), module_relative=False)
    assert found.attempted > 20 and found.failed == 0


@settings(max_examples=40)
@given(
    sizes=st.tuples(*[st.integers(1, 9)] * 2, *[st.integers(1, 4)] * 3),
    end=st.booleans(),
    seed=st.integers(0, 999),
)
def test_tiles_of_any_size_and_rows_say_the_same(sizes: tuple[int, ...], end: bool, seed: int) -> None:
    """Lists of tiles, the same tiles as a predicate, and the same keys as rows per query."""
    n, m, rows, keys, count = sizes
    torch.manual_seed(seed)
    q, k, v = torch.randn(1, H, n, D), torch.randn(1, HKV, m, D), torch.randn(1, HKV, m, DV)
    lists = torch.randint(-1, -(-m // keys), (1, H, -(-n // rows), count))
    how: dict[str, Any] = {"causal": True, "align": "end" if end else "start"}
    seen = (lists[:, :, torch.arange(n) // rows, :, None] == torch.arange(m) // keys).any(3)  # (1, H, N, M)
    t = table(seen)
    first = m - n if end else 0  # where query 0 stands; the table is looked up by row
    dense = attend(q, k, v, keep=lambda h, i, j: t[0, h, i - first, j], **how)
    listed = torch.where(seen, torch.arange(m), -1)
    torch.testing.assert_close(attend(q, k, v, tiles=Tiles(lists, rows, keys), **how), dense)
    torch.testing.assert_close(attend(q, k, v, rows=listed, **how), dense)


def test_a_live_site_keeps_its_own_score_beside_what_is_added() -> None:
    q, k, v = (torch.randn(B, H, 6, D) for _ in range(3))
    bias, r = torch.randn(1, H, 6, 6), torch.randn(H, 12, D)
    facts = Site("layer", 0, heads=H, kv_heads=H, dim=D, v_dim=D, scale=0.3, pattern="causal-self")
    site = LiveSite(facts, AttendSpec(score="s * 0.3 + t0[0, h, i, j]", keep="j <= i"), (bias,))
    terms, t = [Relative(r, lambda i, j: i - j + 6)], table(bias)
    backwards = torch.arange(5, -1, -1).view(1, 1, 6)
    got = attend(q, k, v, site=site, relative=terms, rows=backwards)
    plain = attend(q, k, v, scale=0.3, causal=True, relative=terms, score=lambda s, h, i, j: s + t[0, h, i, j])
    torch.testing.assert_close(got, plain)
    with pytest.raises(Refused, match="beside a site"):
        attend(q, k, v, site=site, causal=True)


def test_a_parameter_with_a_default_keeps_it() -> None:
    q, k, v = torch.randn(1, H, 5, D), torch.randn(1, HKV, 5, D), torch.randn(1, HKV, 5, DV)
    windows = [attend(q, k, v, causal=True, keep=lambda i, j, w=w: i - j < w) for w in (2, 9)]
    assert not torch.equal(windows[0], windows[1])
    assert torch.equal(windows[1], attend(q, k, v, causal=True))
