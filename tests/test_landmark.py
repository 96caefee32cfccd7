"""Landmark attention against its two softmaxes written out: equal and unequal blocks, retrieval, a dense oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hosted_models import ids
from language_swaps import close, swapped
from torch import Tensor

import reattend.passes  # noqa: F401 - fills the registry
from reattend.compiler.decode import Decoder
from reattend.compiler.functional import attention
from reattend.compiler.mechanism import mechanism
from reattend.compiler.problem import problem
from reattend.compiler.refusal import Refused
from reattend.compiler.site import Site


def written_out(q: Tensor, k: Tensor, v: Tensor, ends: list[int], top_k: int | None = None) -> Tensor:
    """Row by row: the tokens since the last landmark, and the landmarks before them with their tokens."""
    q, k, v = q.double(), k.double(), v.double()
    o, scale = torch.zeros_like(q), q.shape[-1] ** -0.5
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            K, V = k[b, h * k.shape[1] // q.shape[1]], v[b, h * k.shape[1] // q.shape[1]]
            for i in range(q.shape[2]):
                z = K @ q[b, h, i] * scale
                closed = [e for e in ends if e < i]
                own = [j for j in range((closed[-1] if closed else -1) + 1, i + 1) if j not in ends]
                starts = dict(zip(closed, [-1, *closed], strict=False))
                if top_k is not None:
                    closed = sorted(sorted(closed, key=lambda e: -float(z[e]))[:top_k])
                first = torch.softmax(z[own + closed], 0)
                for weight, j in zip(first[: len(own)], own, strict=True):
                    o[b, h, i] += weight * V[j]
                for weight, e in zip(first[len(own) :], closed, strict=True):
                    regular = list(range(starts[e] + 1, e))
                    o[b, h, i] += weight * (torch.softmax(z[regular], 0) @ V[regular])
    return o


@pytest.mark.parametrize(("size", "n", "kv"), [(3, 11, 4), (2, 7, 2), (4, 12, 1), (5, 4, 4)])
@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_equal_blocks(size: int, n: int, kv: int, top_k: int | None) -> None:
    q, k, v = problem(n, kv_heads=kv)
    got = attention(q, k, v, "landmark", causal=True, block_size=size, top_k=top_k)
    assert close(got, written_out(q, k, v, list(range(size - 1, n, size)), top_k))


def test_blocks_of_any_length() -> None:
    q, k, v = problem(12)
    marks = torch.zeros(2, 12, dtype=torch.bool)
    marks[0, [2, 7, 9]] = True
    marks[1, [4]] = True
    got = attention(q, k, v, "landmark", causal=True, ports={"is_landmark": marks})
    for b, ends in enumerate(([2, 7, 9], [4])):
        assert close(got[b : b + 1], written_out(*(t[b : b + 1] for t in (q, k, v)), ends))


@pytest.mark.parametrize(("size", "n", "kv", "top_k"), [(3, 11, 4, 1), (2, 9, 2, 2), (4, 16, 1, 1), (3, 12, 4, 9)])
def test_one_set_of_blocks_for_a_block_of_queries(size: int, n: int, kv: int, top_k: int) -> None:
    q, k, v = problem(n, kv_heads=kv)
    how = {"block_size": size, "top_k": top_k, "retrieve_per": "head_max_over_tokens"}
    got = attention(q, k, v, "landmark", causal=True, **how)
    K, V = (t.repeat_interleave(4 // kv, 1) for t in (k, v))
    for b in range(2):
        for h in range(4):
            for a in range(-(-n // size)):
                rows = range(a * size, min((a + 1) * size, n))
                ends = [c * size + size - 1 for c in range(a)]
                shares = torch.stack([torch.softmax(K[b, h, ends] @ q[b, h, i] * 8**-0.5, 0) for i in rows])
                best = sorted(range(a), key=lambda c, s=shares: -float(s[:, c].max()))[:top_k]  # type: ignore[misc]
                seen = [j for c in sorted(best) for j in range(c * size, (c + 1) * size)] + list(rows)
                marks = [j for j, at in enumerate(seen) if at % size == size - 1]
                short = (t[b : b + 1, h : h + 1, seen] for t in (q, K, V))
                assert close(got[b, h, rows], written_out(*short, marks)[0, 0, -len(rows) :])


def rope(x: Tensor, place: int) -> Tensor:
    half = len(x) // 2
    pairs = torch.complex(x[:half], x[half:])
    angle = torch.tensor([place * 10000.0 ** (-d / half) for d in range(half)], dtype=torch.float64)
    pairs = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((pairs.real, pairs.imag))


def renumbered(q: Tensor, k: Tensor, v: Tensor, L: int, top_k: int, chunks: list[tuple[int, int]] | None) -> Tensor:
    """Row by row as the card says; chunks: rows whose landmarks are retrieved together, by their largest shares."""
    q, k, v = q.double(), k.double(), v.double()
    o, scale = torch.zeros_like(q), q.shape[-1] ** -0.5
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            K, V = (t[b, h * t.shape[1] // q.shape[1]] for t in (k, v))

            def landmarks(i: int, b: int = b, h: int = h, K: Tensor = K) -> Tensor:
                nb = i // L
                many = min(top_k, nb)
                base, z = (nb - many - 1) * L, []
                for g in range(nb):
                    place = g * L + L - 1 if g >= nb - many else base + L - 1
                    z.append(rope(q[b, h, i], i) @ rope(K[g * L + L - 1], place) * scale)
                return torch.stack(z) if z else torch.zeros(0)

            for i in range(q.shape[2]):
                nb = i // L
                many = min(top_k, nb)
                base, z = (nb - many - 1) * L, landmarks(i)
                if chunks is not None:
                    first, last = next(c for c in chunks if c[0] <= i < c[1])
                    z = torch.stack([torch.softmax(landmarks(t), 0) for t in range(first, last)]).amax(0)
                best = sorted(sorted(range(nb), key=lambda g, z=z: -float(z[g]))[:many])  # type: ignore[misc]
                at: list[tuple[list[Tensor], list[Tensor]]] = []
                for r, g in enumerate(best):
                    start = base + (r + (g >= nb - many)) * L
                    scores = [rope(q[b, h, i], i) @ rope(K[g * L + t], start + t) * scale for t in range(L)]
                    at.append((scores, [V[g * L + t] for t in range(L)]))
                own = [j for j in range(nb * L, i + 1) if j % L != L - 1]
                direct = [rope(q[b, h, i], i) @ rope(K[j], j) * scale for j in own]
                w = torch.softmax(torch.stack([s[-1] for s, _ in at] + direct), 0)
                for share, (scores, values) in zip(w, at, strict=False):
                    inner = torch.softmax(torch.stack(scores[:-1]), 0)
                    o[b, h, i] += share * sum(x * value for x, value in zip(inner, values, strict=False))
                o[b, h, i] += sum(x * V[j] for x, j in zip(w[len(at) :], own, strict=True))
    return o


def roped(t: Tensor) -> Tensor:
    rows = [torch.stack([rope(x.double(), i) for i, x in enumerate(head)]) for head in t.flatten(0, 1)]
    return torch.stack(rows).view_as(t).to(t.dtype)


@pytest.mark.parametrize(("L", "n", "kv", "top_k"), [(3, 13, 4, 1), (3, 16, 2, 2), (2, 11, 1, 3), (4, 18, 4, 9)])
@pytest.mark.parametrize("shared", [False, True])
def test_retrieved_blocks_move_up(L: int, n: int, kv: int, top_k: int, shared: bool) -> None:
    q, k, v = problem(n, kv_heads=kv)
    how: dict[str, Any] = {"block_size": L, "top_k": top_k, "renumber": True}
    how["retrieve_per"] = "head_max_over_tokens" if shared else "token_head"
    ports = {"k_nope": k}
    got = attention(roped(q), roped(k), v, "landmark", causal=True, ports=ports, **how)
    blocks = [(a, min(a + L, n)) for a in range(0, n, L)] if shared else None
    assert close(got, renumbered(q, k, v, L, top_k, blocks))
    if top_k >= n // L:
        assert close(got, attention(roped(q), roped(k), v, "landmark", causal=True, block_size=L).double())


@pytest.mark.parametrize("pieces", [(7, 1, 1, 1, 1, 1, 1), (1, 4, 8), (5, 2, 6)])
@pytest.mark.parametrize("knobs", [{}, {"top_k": 2}, {"top_k": 2, "renumber": True}], ids=str)
def test_decoding_keeps_the_keys(knobs: dict[str, Any], pieces: tuple[int, ...]) -> None:
    q, k, v = problem(13, kv_heads=2)
    ports = {"k_nope": k} if "renumber" in knobs else {}
    whole = attention(roped(q), roped(k), v, "landmark", causal=True, block_size=3, ports=ports, **knobs)
    site = Site(
        "layer",
        0,
        heads=4,
        kv_heads=2,
        dim=8,
        v_dim=8,
        scale=8**-0.5,
        pattern="causal-self",
        ports=("q", "k", "v", "k_nope"),
    )
    decoder = Decoder(mechanism("landmark", block_size=3, **knobs), site)
    parts = list(zip(*(t.split(pieces, 2) for t in (roped(q), roped(k), v, k)), strict=True))
    got = [(decoder.step if n else decoder.prefill)(*rows[:3], **({"k_nope": rows[3]} if ports else {}))
           for n, rows in enumerate(parts)]  # fmt: skip
    assert close(torch.cat(got, 2), whole.double())
    assert decoder.state_bytes == 2 * 2 * 13 * (8 + 8) * 4


def test_a_landmark_that_scores_as_its_block_gives_dense_attention() -> None:
    """Where z_lm = logsumexp of the block's scores, the two softmaxes are one over all ordinary tokens."""
    q, k, v = (t.double() for t in problem(12, heads=1, batch=1))
    q = q[:, :, :1].expand_as(q)  # then one landmark key is right for all queries
    k = k.clone()
    direction = q[0, 0, 0]
    for e in (3, 7, 11):
        scores = k[0, 0, e - 3 : e] @ direction * 8**-0.5
        k[0, 0, e] = direction * scores.logsumexp(0) * 8**0.5 / direction.square().sum()
    ordinary = [j for j in range(12) if j % 4 != 3]
    dense = attention(q[:, :, ordinary], k[:, :, ordinary], v[:, :, ordinary], "softmax", causal=True)
    got = attention(q, k, v, "landmark", causal=True, block_size=4)
    assert close(got[:, :, ordinary], dense)


def test_the_order_inside_an_earlier_block_and_landmark_values_do_not_matter() -> None:
    q, k, v = problem(10)
    order = [1, 0, 2, *range(3, 10)]
    swapped_v = v[:, :, order].clone()
    swapped_v[:, :, 3::4] = 7.0
    one = attention(q, k, v, "landmark", causal=True, block_size=4)
    two = attention(q, k[:, :, order], swapped_v, "landmark", causal=True, block_size=4)
    assert close(one[:, :, 4:], two[:, :, 4:])


def test_in_a_llama() -> None:
    model, fast = swapped("landmark", block_size=4)
    x = ids(2, 17)
    full, got = model(input_ids=x).logits, fast(input_ids=x).logits
    assert (got - full).abs().max() > 1e-4
    assert close(got[:, :3], full[:, :3]), "before the first landmark"


@pytest.mark.parametrize(
    ("knobs", "causal", "match"),
    [
        ({"renumber": True}, True, "renumber without top_k"),
        ({}, False, "noncausal-self"),
        ({"block_size": 1}, True, "at least one token"),
        ({"top_k": 0}, True, "top_k"),
    ],
)
def test_refused(knobs: dict[str, Any], causal: bool, match: str) -> None:
    q, k, v = problem()
    with pytest.raises(Refused, match=match):
        attention(q, k, v, "landmark", causal=causal, **knobs)
