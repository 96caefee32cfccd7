"""Softplus attention with re-weighting against its five steps, row by row; its range; decoding; a real model."""

from __future__ import annotations

import math

import pytest
import torch
import transformers as hf
from torch import Tensor

import reattend
from reattend.compiler.decode import Decoder
from reattend.compiler.functional import attention
from reattend.compiler.problem import problem
from reattend.compiler.refusal import Refused
from reattend.compiler.site import Site
from reattend.passes.score.lssar import Lssar


def written_out(q: Tensor, k: Tensor, v: Tensor, m: Lssar, causal: bool, seen: Tensor) -> Tensor:
    B, H, N, D = q.shape
    o = torch.zeros(B, H, N, v.shape[-1], dtype=q.dtype)
    for x in range(B):
        for h in range(H):
            g = h // (H // k.shape[1])
            for i in range(N):
                keys = [j for j in range(i + 1 if causal else N) if seen[x, j]]
                n = len(keys)
                cosines = torch.stack([torch.cosine_similarity(q[x, h, i], k[x, g, j], 0) for j in keys])
                s = torch.log1p(torch.exp(math.log(D) * math.log(n) * cosines))
                w = s / (s.sum() + m.eps)
                if m.reweight:
                    b = torch.relu(n * w - (0 if n <= m.offset_free_rows else m.offset)) ** m.p
                    w = b / (b.sum() + m.eps) if b.any() else b
                o[x, h, i] = w @ v[x, g, keys]
    return o


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "m",
    [Lssar(), Lssar(False), Lssar(p=3, eps=0.0), Lssar(p=2.5, offset=0.5, offset_free_rows=5), Lssar(eps=1e-3)],
    ids=repr,
)
def test_it_is_its_formula(causal: bool, m: Lssar) -> None:
    q, k, v = problem(11, kv_heads=2, dtype=torch.float64)
    seen = torch.ones(2, 11, dtype=torch.bool)
    seen[1, -3:] = False
    expected = written_out(q, k, v, m, causal, seen)
    assert torch.allclose(attention(q, k, v, m, causal=causal, mask=seen), expected, atol=1e-10)
    got = attention(*(t.float() for t in (q, k, v)), m, causal=causal, mask=seen)
    # at p = 15 a relative error of 1e-7 in a weight near its row's mean grows with the power
    assert torch.allclose(got.double(), expected, atol=1e-5 if m.p < 15 else 3e-5)


def test_padding_on_the_left_leaves_a_sample_as_it_is() -> None:
    q, k, v = problem(9)
    seen = torch.ones(2, 9, dtype=torch.bool)
    seen[:, :4] = False
    alone = attention(*(t[:, :, 4:] for t in (q, k, v)), "lssar", causal=True)
    assert torch.allclose(attention(q, k, v, "lssar", causal=True, mask=seen)[:, :, 4:], alone, atol=1e-5)


def test_the_power_stays_in_range() -> None:
    """(n - 1)^15 overflows float32 from n = 365 on: one key takes nearly all of 600."""
    q, k, v = problem(600, heads=1, batch=1)
    k = -q[:, :, -1:].expand_as(k).clone()
    k[:, :, 100] = q[:, :, -1]
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    o = attention(q, k, v, "lssar")
    assert bool(torch.isfinite(o).all()) and torch.allclose(o[:, :, -1], v[:, :, 100], atol=1e-4)
    o.square().sum().backward()
    assert all(bool(torch.isfinite(t.grad).all()) for t in (q, k, v))


def test_a_large_power_picks_the_best_key() -> None:
    q, k, v = problem(12)
    best = (torch.nn.functional.normalize(q, dim=-1) @ torch.nn.functional.normalize(k, dim=-1).mT).argmax(-1)
    expected = v.gather(2, best[..., None].expand_as(v))
    assert torch.allclose(attention(q, k, v, Lssar(p=4000, eps=0.0)), expected, atol=1e-3)


def test_decoding_keeps_what_softmax_keeps() -> None:
    q, k, v = problem(12, kv_heads=2, dtype=torch.float64)
    site = Site("layer", 0, heads=4, kv_heads=2, dim=8, v_dim=8, scale=8**-0.5, pattern="causal-self")
    for m in (Lssar(), Lssar(False)):
        decoder = Decoder(m, site)
        pieces = [decoder.prefill(q[:, :, :5], k[:, :, :5], v[:, :, :5])]
        pieces += [decoder.step(*(t[:, :, a:b] for t in (q, k, v))) for a, b in ((5, 6), (6, 9), (9, 12))]
        assert torch.allclose(torch.cat(pieces, 2), attention(q, k, v, m, causal=True), atol=1e-9)
        assert decoder.state["k"].shape == k.shape and set(decoder.state) == {"k", "v"}


def test_a_windowed_site_is_refused() -> None:
    site = Site("layer", 0, heads=4, kv_heads=4, dim=8, v_dim=8, scale=1.0, pattern="causal-self",
                features=frozenset({"window"}), window=4)  # fmt: skip
    assert "window" in (Lssar().refuses(site) or "")
    with pytest.raises(Refused, match="p >= 1"):
        Lssar(p=0.5)


def test_in_a_llama_it_runs_and_passes_gradients_on() -> None:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
                       vocab_size=60, num_hidden_layers=1, pad_token_id=0)
    ).eval()  # fmt: skip
    ids = torch.randint(1, 60, (2, 9))
    seen = torch.ones_like(ids)
    seen[1, :3] = 0
    recipe = {"version": 1, "sites": [{"match": "*", "attention": {"lssar": {"p": 3}}}]}
    fast = reattend.optimize(model, recipe, {"input_ids": ids, "attention_mask": seen})
    logits = fast(input_ids=ids, attention_mask=seen).logits
    alone = fast(input_ids=ids[1:, 3:], attention_mask=seen[1:, 3:]).logits
    assert torch.allclose(logits[1:, 3:], alone, atol=1e-5)
    logits.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for n, p in fast.named_parameters() if "q_proj" in n)


@pytest.mark.parametrize(("n", "m"), [(9, 5), (5, 9)])
def test_across_two_sequences_every_row_has_its_own_mean(n: int, m: int) -> None:
    q, k, v = problem(n, m)
    cosines = torch.nn.functional.normalize(q, dim=-1) @ torch.nn.functional.normalize(k, dim=-1).mT
    s = torch.nn.functional.softplus(math.log(8) * math.log(m) * cosines)
    above = torch.relu(s * m / s.sum(-1, keepdim=True) - 1) ** 3
    expected = above / above.sum(-1, keepdim=True) @ v
    assert torch.allclose(attention(q, k, v, "lssar", p=3, eps=0.0), expected, atol=1e-5)
