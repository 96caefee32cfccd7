"""Landmark attention against its two softmaxes written out: equal and unequal blocks, retrieval, a dense oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hosted_models import ids
from language_swaps import close, swapped
from torch import Tensor

import reattend.passes  # noqa: F401 - fills the registry
from reattend.compiler.functional import attention
from reattend.compiler.problem import problem
from reattend.compiler.refusal import Refused


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
    [({}, False, "noncausal-self"), ({"block_size": 1}, True, "at least one token"), ({"top_k": 0}, True, "top_k")],
)
def test_refused(knobs: dict[str, Any], causal: bool, match: str) -> None:
    q, k, v = problem()
    with pytest.raises(Refused, match=match):
        attention(q, k, v, "landmark", causal=causal, **knobs)
