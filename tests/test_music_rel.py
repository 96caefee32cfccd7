"""Relative logits against loops over rows and keys; the skewing of the paper; decoding; a real model."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import Tensor

import reattend
from reattend.compiler.functional import attention
from reattend.compiler.problem import problem
from reattend.compiler.refusal import Refused


def written_out(q: Tensor, k: Tensor, v: Tensor, E: Tensor, L: int, causal: bool, seen: Tensor | None) -> Tensor:
    """One row and one key at a time."""
    B, H, N, D = q.shape
    o = torch.zeros(B, H, N, v.shape[-1], dtype=q.dtype)
    for b in range(B):
        for h in range(H):
            g, table = h // (H // k.shape[1]), E if E.ndim == 2 else E[h]
            for i in range(N):
                logits = torch.full((N,), -torch.inf, dtype=q.dtype)
                for j in range(i + 1 if causal else N):
                    row = min(max(L - 1 - (i - j), 0), len(table) - 1)
                    if seen is None or seen[b, j]:
                        logits[j] = (q[b, h, i] @ k[b, g, j] + q[b, h, i] @ table[row]) / D**0.5
                o[b, h, i] = torch.softmax(logits, 0) @ v[b, g]
    return o


def random_table(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("L", [3, 9, 12])
def test_it_is_its_formula(causal: bool, share: bool, L: int) -> None:
    q, k, v = problem(9, kv_heads=2, dtype=torch.float64)
    E = random_table(*(() if share else (4,)), L if causal else 2 * L - 1, 8)
    seen = torch.ones(2, 9, dtype=torch.bool)
    seen[1, -2:] = False
    for mask in (None, seen):
        got = attention(
            *(t.float() for t in (q, k, v)), "music_rel", causal=causal, max_len=L, share_heads=share, mask=mask,
            params={"rel_emb": E.float()},
        )  # fmt: skip
        assert torch.allclose(got.double(), written_out(q, k, v, E, L, causal, mask), atol=1e-5)


def test_it_is_the_skewing_of_the_paper() -> None:
    q, k, v = problem(6)
    E = random_table(10, 8).float()
    T = q @ E[10 - 6 :].mT
    S = torch.nn.functional.pad(T, (1, 0)).reshape(2, 4, 7, 6)[:, :, 1:]
    logits = ((q @ k.mT + S) * 8**-0.5).masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -torch.inf)
    got = attention(q, k, v, "music_rel", causal=True, max_len=10, params={"rel_emb": E})
    assert torch.allclose(got, torch.softmax(logits, -1) @ v, atol=1e-5)


def test_tables_of_two_heads_swapped_swap_what_they_do() -> None:
    q, k, v = (t[:, :1].expand(2, 2, 6, 8) for t in problem(6))
    E = random_table(2, 6, 8).float()
    one, other = (
        attention(q, k, v, "music_rel", causal=True, max_len=6, share_heads=False, params={"rel_emb": t})
        for t in (E, E.flip(0))
    )
    assert torch.allclose(one, other.flip(1), atol=1e-6)
    assert not torch.allclose(one, other, atol=1e-3)


def test_a_longer_sequence_is_refused_without_clipping() -> None:
    q, k, v = problem(7)
    with pytest.raises(Refused, match="7 tokens, a table of max_len=5 rows"):
        attention(q, k, v, "music_rel", causal=True, max_len=5, clip=False)


def test_in_a_llama_it_starts_as_the_model_and_learns() -> None:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
                       vocab_size=60, num_hidden_layers=1)
    ).eval()  # fmt: skip
    ids = torch.randint(1, 60, (2, 7))
    recipe = {"version": 1, "sites": [{"match": "*", "attention": {"music_rel": {"max_len": 16}}}]}
    fast = reattend.optimize(model, recipe, {"input_ids": ids})
    logits = fast(input_ids=ids).logits
    assert torch.allclose(logits, model(input_ids=ids).logits, atol=1e-5)
    logits.square().mean().backward()
    tables = [p for n, p in fast.named_parameters() if n.endswith("rel_emb")]
    assert len(tables) == 1 and all(t.grad is not None and t.grad.any() for t in tables)
