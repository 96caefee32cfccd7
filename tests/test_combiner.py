"""Combiner against its sets of tokens and spans, row by row, with the summary of each span made anew."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hosted_models import ids
from language_swaps import close, swapped
from torch import Tensor

import reattend.passes  # noqa: F401 - fills the registry
from reattend.compiler.functional import attention
from reattend.compiler.problem import hidden, problem
from reattend.compiler.refusal import Refused

Sets = tuple[list[int], list[list[int]]]


def sets(variant: str, i: int, n: int, s: int, causal: bool) -> Sets:
    """Tokens seen one by one and spans, of row i; empty spans are left out."""
    r, u = divmod(i, s)
    at = lambda t, w: t * s + w
    line = lambda pairs: [at(t, w) for t, w in pairs if at(t, w) < n]
    spans: list[list[int]] = []
    if variant == "fixed":
        own = range(r * s, i + 1) if causal else range(r * s, min(n, (r + 1) * s))
        rows = range(r) if causal else range(-(-n // s))
        return list(own), [list(range(t * s, min(n, (t + 1) * s))) for t in rows]
    if variant == "logsparse":
        bits = [level for level in range(20) if i >> level & 1]
        return [i], [list(range(((i >> b) - 1) << b, (i >> b) << b)) for b in bits]
    if variant == "axial_mixture":
        spans += [line((t, w) for t in range(r)) for w in range(s) if w != u]
        for t in range(r):
            spans += [line((t, w) for w in range(u)), line((t, w) for w in range(u + 1, s))]
        return line((t, u) for t in range(r)) + line((r, w) for w in range(u + 1)), [z for z in spans if z]
    height = -(-n // s)
    for w in range(s):
        spans += [line((t, w) for t in range(r)), line((t, w) for t in range(r + 1, height))]
    for t in range(height):
        if at(t, u - 1) < n and u:
            spans.append(line((t, w) for w in range(u)))
        spans.append(line((t, w) for w in range(u + 1, s)))
    return line((r, w) for w in range(s)) + line((t, u) for t in range(height)), [z for z in spans if z]


def heads(q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor]]:
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            g = h * k.shape[1] // q.shape[1]
            yield b, h, q[b, h].double(), k[b, g].double(), v[b, g].double()


def pooled(x: Tensor, pool: str, W: Tensor | None = None) -> Tensor:
    act, _, how = pool.rpartition("-")
    x = x if W is None else x @ W.double()
    x = x.clamp(min=0) if act in ("relu", "deepset") else x
    return x.amax(0) if how == "max" else x.mean(0) if how == "mean" else x.sum(0)


def written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    variant: str,
    s: int,
    causal: bool = True,
    pool: str = "max",
    own: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    o, scale = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64), q.shape[-1] ** -0.5
    for b, h, Q, K, V in heads(q, k, v):
        for i in range(q.shape[2]):
            direct, spans = sets(variant, i, q.shape[2], s, causal)
            items = [(K[j], V[j]) for j in direct]
            for z in spans:
                mean = pooled(Q[z], pool, own[0]) * scale
                items.append((pooled(K[z], pool, own[1]), torch.softmax(K[z] @ mean, 0) @ V[z]))
            w = torch.softmax(torch.stack([key @ Q[i] for key, _ in items]) * scale, 0)
            o[b, h, i] = sum(x * value for x, (_, value) in zip(w, items, strict=True))
    return o


@pytest.mark.parametrize("pool", ["max", "mean", "sum", "relu-max"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("n", "s"), [(11, 3), (6, 2), (4, 7)])
def test_fixed(n: int, s: int, causal: bool, pool: str) -> None:
    q, k, v = problem(n, kv_heads=2)
    got = attention(q, k, v, "combiner", causal=causal, seg_len=s, summary_pool=pool)
    assert close(got, written_out(q, k, v, "fixed", s, causal, pool))


@pytest.mark.parametrize("pool", ["deepset-max", "deepset-mean", "deepset-sum", "identity-max"])
@pytest.mark.parametrize("variant", ["fixed", "logsparse"])
def test_pools_of_learned_features(variant: str, pool: str) -> None:
    q, k, v = problem(11, kv_heads=2)
    W = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(3)).unbind()
    p = dict(zip(("deepset_query_weight", "deepset_key_weight"), W, strict=True)) if "deepset" in pool else {}
    got = attention(q, k, v, "combiner", causal=True, variant=variant, seg_len=3, summary_pool=pool, params=p)
    assert close(got, written_out(q, k, v, variant, 3, True, pool, W if p else (None, None)))


def test_parts_without_tokens_count_in_the_papers_mixture() -> None:
    """Each is a key of 0 with the mean of its column or row: attention with four summaries in every direction."""
    q, k, v = problem(12, heads=2)
    got = attention(q, k, v, "combiner", variant="axial_mixture_bidir", seg_len=4, summary_pool="sum", count_empty=True)
    o = torch.zeros_like(q, dtype=torch.float64)
    for b, h, Q, K, V in heads(q, k, v):
        for i in range(12):
            r, u = divmod(i, 4)
            lines = [[4 * t + w for t in range(3)] for w in range(4)]
            parts = [(line, [line[:r], line[r + 1 :]]) for line in lines]
            lines = [[4 * t + w for w in range(4)] for t in range(3)]
            parts += [(line, [line[:u], line[u + 1 :]]) for line in lines]
            items = [(K[j], V[j]) for j in (*range(4 * r, 4 * r + 4), *range(u, 12, 4))]
            for line, two in parts:
                for z in two:
                    w = torch.softmax(K[z] @ Q[z].sum(0) * 8**-0.5, 0)
                    items.append((K[z].sum(0), w @ V[z] if z else V[line].mean(0)))
            w = torch.softmax(torch.stack([key @ Q[i] for key, _ in items]) * 8**-0.5, 0)
            o[b, h, i] = sum(x * value for x, (_, value) in zip(w, items, strict=True))
    assert close(got, o)


@pytest.mark.parametrize("n", [3, 5, 9, 8])
def test_the_papers_logsparse_has_a_level_too_few(n: int) -> None:
    q, k, v = problem(n)
    got = attention(q, k, v, "combiner", causal=True, variant="logsparse", short_levels=True)
    whole = attention(q, k, v, "combiner", causal=True, variant="logsparse")
    if n == 8:
        assert torch.equal(got, whole)
    else:
        assert close(got[:, :, :-1], whole[:, :, :-1]) and close(got[:, :, -1], v[:, :, -1])


@pytest.mark.parametrize("n", [1, 2, 5, 8, 13])
def test_logsparse(n: int) -> None:
    q, k, v = problem(n, kv_heads=2)
    got = attention(q, k, v, "combiner", causal=True, variant="logsparse")
    assert close(got, written_out(q, k, v, "logsparse", 1))


@pytest.mark.parametrize("pool", ["max", "sum"])
@pytest.mark.parametrize(("n", "s"), [(12, 4), (11, 3), (5, 7)])
@pytest.mark.parametrize("variant", ["axial_mixture", "axial_mixture_bidir"])
def test_axial_mixtures(variant: str, n: int, s: int, pool: str) -> None:
    q, k, v = problem(n, heads=2)
    causal = variant == "axial_mixture"
    got = attention(q, k, v, "combiner", causal=causal, variant=variant, seg_len=s, summary_pool=pool)
    assert close(got, written_out(q, k, v, variant, s, causal, pool))


@pytest.mark.parametrize(("n", "s"), [(12, 4), (11, 3)])
def test_axial_rowmajor(n: int, s: int) -> None:
    q, k, v = problem(n)
    x, draw = hidden(n), torch.Generator().manual_seed(2)
    shapes = {"row_out_weight": (4, 8, 32), "row_ln_weight": (32,), "row_ln_bias": (32,), "row_key_weight": (32, 4, 8)}
    p = {name: 0.5 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    got = attention(q, k, v, "combiner", causal=True, variant="axial_rowmajor", seg_len=s, params=p, ports={"x": x})
    y = torch.zeros(2, n, 4, 8, dtype=torch.float64)
    for b, h, Q, K, V in heads(q, k, v):
        for i in range(n):
            row = list(range(i // s * s, min(n, i // s * s + s)))
            y[b, i, h] = torch.softmax(K[row] @ Q[i] * 8**-0.5, 0) @ V[row]
    P = {name: t.double() for name, t in p.items()}
    z = x.double() + torch.einsum("bnhd,hdf->bnf", y, P["row_out_weight"])
    z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    key = torch.einsum("bnf,fhd->bnhd", z * P["row_ln_weight"] + P["row_ln_bias"], P["row_key_weight"])
    o = torch.zeros_like(q, dtype=torch.float64)
    for b, h, Q, K, V in heads(q, k, v):
        for i in range(n):
            own, above = list(range(i // s * s, i + 1)), list(range(i % s, i // s * s, s))
            w = torch.softmax(torch.cat((K[own], key[b, above, h])) @ Q[i] * 8**-0.5, 0)
            o[b, h, i] = w @ torch.cat((V[own], y[b, above, h]))
    assert close(got, o)


@pytest.mark.parametrize("variant", ["fixed", "axial_mixture", "axial_rowmajor"])
def test_in_a_llama(variant: str) -> None:
    model, fast = swapped("combiner", variant=variant, seg_len=4)
    x = ids(2, 17)
    full, got = model(input_ids=x).logits, fast(input_ids=x).logits
    assert (got - full).abs().max() > 1e-5
    assert close(got[:, :4], full[:, :4]), "the first row has no span"


@pytest.mark.parametrize(
    ("knobs", "causal", "match"),
    [
        ({"variant": "axial_mixture"}, False, "causal"),
        ({"variant": "axial_mixture_bidir"}, True, "noncausal"),
        ({"variant": "axial_mixture", "summary_pool": "mean"}, True, "max or sum"),
        ({"variant": "sqrt"}, True, "variants"),
    ],
)
def test_refused(knobs: dict[str, Any], causal: bool, match: str) -> None:
    q, k, v = problem()
    with pytest.raises(Refused, match=match):
        attention(q, k, v, "combiner", causal=causal, **knobs)


def test_an_open_length_is_refused_by_logsparse() -> None:
    with pytest.raises(Refused, match="known length"):
        swapped("combiner", variant="logsparse")
