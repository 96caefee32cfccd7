"""Toeplitz factors behind softmax against loops over rows and keys; the rows of both bucket maps; a real model."""

from __future__ import annotations

import math

import pytest
import torch
import transformers as hf
from torch import Tensor

import reattend
from reattend.compiler.functional import attention
from reattend.compiler.problem import problem
from reattend.passes.score.urpe import Urpe


def row_of(d: int, m: Urpe) -> int:
    """The card's bucket map, one distance at a time."""
    if m.buckets == "unique":
        return max(-(m.max_len - 1), min(m.max_len - 1, d)) + m.max_len - 1

    def t(d: int) -> int:
        nb, n = m.num_buckets // 2, abs(d)
        ex = nb // 2
        if n >= ex:
            n = min(nb - 1, ex + math.floor(math.log(n / ex) / math.log(m.max_distance / ex) * (nb - ex)))
        return n + 2 if d >= 0 else -n

    return t(max(1 - m.max_len, min(m.max_len - 1, d))) - min(t(x) for x in range(1 - m.max_len, m.max_len))


def written_out(q: Tensor, k: Tensor, v: Tensor, C: Tensor, b: Tensor, m: Urpe, causal: bool, seen: Tensor) -> Tensor:
    B, H, N, D = q.shape
    o = torch.zeros_like(q)
    for x in range(B):
        for h in range(H):
            g = h // (H // k.shape[1])
            for i in range(N):
                keys = [j for j in range(i + 1 if causal else N) if seen[x, j]]
                rows = [row_of(j - i, m) for j in keys]
                logits = k[x, g, keys] @ q[x, h, i] / D**0.5 + b[rows, h]
                o[x, h, i] = (torch.softmax(logits, 0) * C[rows, h]) @ v[x, g, keys]
    return o


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "m",
    [
        Urpe(4), Urpe(20), Urpe(20, "log", 8, 12), Urpe(6, "log", 8, 12), Urpe(64, "log", 16, 9),
    ],
    ids=repr,
)  # fmt: skip
def test_it_is_its_formula(causal: bool, m: Urpe) -> None:
    q, k, v = problem(11, kv_heads=2, dtype=torch.float64)
    draw = torch.Generator().manual_seed(3)
    C, b = (torch.randn(m.rows, 4, generator=draw, dtype=torch.float64) for _ in "Cb")
    seen = torch.ones(2, 11, dtype=torch.bool)
    seen[1, -3:] = False
    got = attention(*(t.float() for t in (q, k, v)), m, causal=causal, mask=seen,
                    params={"urpe_weight": C.float(), "rpe_bias": b.float()})  # fmt: skip
    assert torch.allclose(got.double(), written_out(q, k, v, C, b, m, causal, seen), atol=1e-5)


def test_logarithmic_rows_are_exact_near_and_end_where_they_should() -> None:
    m = Urpe(200, "log")
    rows = m._log_rows(torch.device("cpu")).tolist()
    assert rows == [row_of(d, m) for d in range(-199, 200)]
    assert (min(rows), max(rows)) == (0, m.rows - 1)
    near = rows[199 - 15 : 199 + 16]
    assert len(set(near)) == 31 and not {31, 32} & set(rows), "one row per near distance; two rows stay unused"


def test_equal_values_no_longer_come_out_equal() -> None:
    q, k, v = problem(6)
    u = v[:, :, :1].expand_as(v)
    assert torch.allclose(attention(q, k, u, "softmax"), u, atol=1e-6)
    C = torch.rand(11, 4, generator=torch.Generator().manual_seed(0))
    o = attention(q, k, u, "urpe", max_len=6, params={"urpe_weight": C})
    factors = o / u
    assert torch.allclose(factors, factors[..., :1].expand_as(factors), atol=1e-4), "a multiple of u at each position"
    assert float(factors[..., 0].std(-1).min()) > 0.01, "and not the same one"


def test_in_a_gpt2_it_starts_as_the_model_and_learns() -> None:
    torch.manual_seed(0)
    model = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=60, n_positions=32)).eval()
    ids = torch.randint(1, 60, (2, 7))
    recipe = {"version": 1, "sites": [{"match": "*", "attention": {"urpe": {"max_len": 16}}}]}
    fast = reattend.optimize(model, recipe, {"input_ids": ids})
    logits = fast(input_ids=ids).logits
    assert torch.allclose(logits, model(input_ids=ids).logits, atol=1e-5)
    logits.square().mean().backward()
    learned = [p for n, p in fast.named_parameters() if n.endswith(("urpe_weight", "rpe_bias"))]
    assert len(learned) == 4 and all(t.grad is not None and t.grad.any() for t in learned)
