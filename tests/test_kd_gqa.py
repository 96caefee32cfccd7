"""Allocations against the loops of the card; converted heads against converted weights; buffers, noise, a real ViT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reattend
from reattend.compiler.functional import attention, attention_and_aux
from reattend.compiler.problem import hidden, problem
from reattend.compiler.refusal import Refused
from reattend.passes.heads.kd_gqa import allocated


def by_loops(u: list[float], heads: int) -> list[int]:
    """Rounded half to even, then mended one by one, the first index among equals."""
    total = sum(u)
    a = [round(x / total * heads) if total > 0 else heads // len(u) for x in u]
    while sum(a) > heads:
        a[a.index(max(a))] -= 1
    while sum(a) < heads:
        a[a.index(min(a))] += 1
    return a


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=9), st.integers(1, 5))
def test_an_allocation_is_that_of_the_loops(weights: list[int], share: int) -> None:
    heads = share * len(weights)
    a = allocated(torch.tensor(weights, dtype=torch.float64), heads).tolist()
    assert a == by_loops([float(w) for w in weights], heads)
    assert sum(a) == heads and min(a) >= 0


def written_out(q: Tensor, k: Tensor, v: Tensor, a: list[int]) -> Tensor:
    owner = [g for g, count in enumerate(a) for _ in range(count)]
    o = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h, g in enumerate(owner):
            o[b, h] = torch.softmax(q[b, h] @ k[b, g].T / q.shape[-1] ** 0.5, -1) @ v[b, g]
    return o


def norms(k: Tensor) -> list[float]:
    return [sum(float(k[b, g].norm()) for b in range(k.shape[0])) for g in range(k.shape[1])]


@pytest.mark.parametrize("kv_heads", [2, 4, 8])
def test_keys_draw_queries(kv_heads: int) -> None:
    q, k, v = problem(7, heads=8, kv_heads=kv_heads, dtype=torch.float64)
    k = k * torch.tensor([1.0, 2.5, 0.7, 1.9, 0.2, 1.1, 3.0, 0.4], dtype=torch.float64)[:kv_heads, None, None]
    n = norms(k)
    a = by_loops([(x - min(n)) / (max(n) - min(n)) for x in n], 8)
    assert a[n.index(min(n))] == 0, "the weakest key head is dropped"
    for factor in (1.0, 2.0):
        got = attention(q, factor * k, v, "kd_gqa", variant="kdgqa")
        assert torch.allclose(got, written_out(q, factor * k, v, a), atol=1e-9)
    silent = v.clone()
    silent[:, n.index(min(n))] += 5
    assert torch.equal(
        attention(q, k, v, "kd_gqa", variant="kdgqa"), attention(q, k, silent, "kd_gqa", variant="kdgqa")
    )
    order = torch.arange(kv_heads).flip(0)
    flipped = attention(q, k[:, order], v[:, order], "kd_gqa", variant="kdgqa")
    if len(set(a)) == len(a):  # heads that are told apart by their norms alone
        assert torch.allclose(flipped, written_out(q, k[:, order], v[:, order], a[::-1]), atol=1e-9)


@pytest.mark.parametrize("change", ["ema", "diff"])
def test_a_running_allocation_is_frozen_until_it_is_made_anew(change: str) -> None:
    q, k, v = problem(7, heads=8, kv_heads=4)
    k = k * torch.tensor([1.0, 4.0, 2.0, 1.5])[:, None, None]
    n, cache = norms(k), [3.0, 1.0, 2.0, 9.0]
    u = [0.9 * x + 0.1 * c if change == "ema" else abs(c - x) for x, c in zip(n, cache, strict=True)]
    fresh = by_loops(u, 8)
    assert fresh != [2, 2, 2, 2]
    knobs: dict[str, Any] = {"variant": "dgqa", "change": change, "window_size": 3}
    train = {"train": torch.ones(())}
    for step, due in ((0, True), (2, False), (6, True)):
        own = {"cache": torch.tensor(cache), "allocation": torch.tensor([3, 1, 0, 4]), "step": torch.tensor([step])}
        o, aux = attention_and_aux(q, k, v, "kd_gqa", params=own, **knobs)
        assert torch.allclose(o, written_out(q, k, v, [3, 1, 0, 4]), atol=1e-5)
        assert aux.buffers["allocation"].tolist() == (fresh if due else [3, 1, 0, 4])
        expected = [(c + x) / 3 for c, x in zip(cache, n, strict=True)] if due else cache
        assert torch.allclose(aux.buffers["cache"], torch.tensor(expected), rtol=1e-5)
        assert aux.buffers["step"].tolist() == [step + 1]
        at_once = attention(q, k, v, "kd_gqa", params=own, ports=train, at_once=True, **knobs)
        assert torch.allclose(at_once, written_out(q, k, v, fresh if due else [3, 1, 0, 4]), atol=1e-5)
        every, aux = attention_and_aux(
            q, k, v, "kd_gqa", params=own, at_once=True, **knobs
        )  # as in the reference's eval()
        assert torch.allclose(every, written_out(q, k, v, fresh), atol=1e-5)
        assert torch.allclose(aux.buffers["cache"], torch.tensor(n), rtol=1e-5)
        assert aux.buffers["step"].tolist() == [step]


def test_joined_heads_are_joined_weights() -> None:
    x = hidden(6, width=32, dtype=torch.float64)
    q = problem(6, heads=4, dtype=torch.float64)[0]
    w_k, w_v = torch.randn(2, 4, 8, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def heads(w: Tensor) -> Tensor:
        return torch.einsum("bnc,hdc->bhnd", x, w)

    got = attention(q, heads(w_k), heads(w_v), "kd_gqa", num_kv_heads=2)
    small = [heads(w.reshape(2, 2, 8, 32).mean(1)) for w in (w_k, w_v)]
    assert torch.allclose(got, attention(q, *small, "softmax"), atol=1e-9)
    first = attention(q, heads(w_k), heads(w_v), "kd_gqa", num_kv_heads=2, method="first")
    assert torch.allclose(first, attention(q, heads(w_k[::2]), heads(w_v[::2]), "softmax"), atol=1e-9)


def test_noise_has_the_rows_own_mean_and_deviation() -> None:
    q, k, v = problem(5, heads=4, kv_heads=2)
    torch.manual_seed(0)
    got = attention(q, k, v, "kd_gqa", variant="pgqa")
    O = attention(q, k, v, "softmax").reshape(2, 2, 2, 40)  # (B, G, H / G, N * D)
    torch.manual_seed(0)
    R = torch.rand(2, 2, 40)
    expected = torch.zeros_like(O)
    for b in range(2):
        for g in range(2):
            for r in range(2):
                row = R[g, r].clone()
                row[r] = 0.0
                row = (row - row.mean()) / row.std()
                expected[b, g, r] = O[b, g, r] - (row * O[b, g, r].std() + O[b, g, r].mean())
    assert torch.allclose(got.reshape(2, 2, 2, 40), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("knobs", "causal", "match"),
    [
        ({"num_kv_heads": 3}, False, "does not divide the 4 key heads"),
        ({"variant": "kdgqa"}, True, "look ahead on a causal site"),
        ({"variant": "mqa"}, False, "one of gqa, kdgqa"),
    ],
)
def test_what_does_not_fit_is_refused(knobs: dict[str, Any], causal: bool, match: str) -> None:
    q, k, v = problem(5)
    with pytest.raises(Refused, match=match):
        attention(q, k, v, "kd_gqa", causal=causal, **knobs)


@pytest.mark.parametrize("hosted", [True, False])
def test_at_once_knows_whether_it_trains(hosted: bool) -> None:
    """Between two dates a layer in training keeps its allocation, and one in eval() makes its own for every batch."""
    torch.manual_seed(0)
    knobs: dict[str, Any] = {"variant": "dgqa", "at_once": True, "window_size": 2}
    if hosted:
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=64, num_heads=4).eval()
        x = torch.randn(2, 3, 32, 32)
        recipe = {"version": 1, "sites": [{"match": "*", "attention": {"kd_gqa": knobs}}]}
        layer = reattend.optimize(model, recipe, (x,))
    else:
        layer, x = reattend.Attention("kd_gqa", 64, 4, **knobs), torch.randn(2, 9, 64)
    held = {n.rpartition(".")[2]: b for n, b in layer.named_buffers()}
    layer.train()
    held["step"].fill_(1)
    held["allocation"].copy_(torch.tensor([4, 0, 0, 0]))
    layer(x)
    assert held["allocation"].tolist() == [4, 0, 0, 0] and held["step"].item() == 2
    kept = layer(x)  # a step at which it is due
    assert held["allocation"].tolist() != [4, 0, 0, 0]
    held["allocation"].copy_(torch.tensor([4, 0, 0, 0]))
    fresh = layer.eval()(x)
    assert kept.shape == fresh.shape and held["allocation"].tolist() == [4, 0, 0, 0]
    held["allocation"].copy_(torch.tensor([0, 0, 0, 4]))
    assert torch.equal(layer(x), fresh), "in eval() the kept one does not matter"


def test_in_a_vit_its_allocation_follows_training() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=64, num_heads=4).eval()
    x = torch.randn(2, 3, 32, 32)
    recipe = {"version": 1, "sites": [{"match": "*", "attention": {"kd_gqa": {"variant": "dgqa"}}}]}
    fast = reattend.optimize(model, recipe, (x,))
    assert torch.allclose(fast(x), model(x), atol=1e-5), "one query head per key head at first"
    buffers = {n.rpartition(".")[2]: b for n, b in fast.named_buffers()}
    assert buffers["allocation"].tolist() == [1, 1, 1, 1] and buffers["step"].item() == 0
    fast.train()
    fast(x).square().mean().backward()
    assert buffers["step"].item() == 1 and buffers["allocation"].sum() == 4 and bool((buffers["cache"] > 0).all())


def tiny_llama(**more: Any) -> Any:
    torch.manual_seed(0)
    config = hf.LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=4, intermediate_size=48,
                            num_hidden_layers=2, vocab_size=60, **more)  # fmt: skip
    return hf.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("method", ["mean", "first", "random"])
def test_joined_heads_leave_as_a_stock_model_with_smaller_weights(method: str, tmp_path: Path) -> None:
    model, ids = tiny_llama(attention_bias=True), torch.arange(1, 13).reshape(2, 6)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.k_proj.bias)
    wish = {"kd_gqa": {"num_kv_heads": 2, "method": method}}
    fast = reattend.optimize(model, {"version": 1, "sites": [{"match": "*", "attention": wish}]}, {"input_ids": ids})
    logits = fast(input_ids=ids).logits
    assert not torch.allclose(logits, model(input_ids=ids).logits, atol=1e-3)
    assert fast.ships()["hf"].open
    fast.export("hf", tmp_path)
    stock = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(stock) is hf.LlamaForCausalLM and stock.config.num_key_value_heads == 2
    attention_module = stock.model.layers[0].self_attn
    assert [tuple(attention_module.get_submodule(p).weight.shape) for p in ("k_proj", "v_proj")] == [(16, 32)] * 2
    assert torch.allclose(stock(input_ids=ids).logits, logits, atol=1e-5)
    assert fast.model.layers[0].self_attn.k_proj.weight.shape == (32, 32), "the hosted model keeps what training needs"


def test_what_a_stock_class_cannot_say_is_refused() -> None:
    model, ids = tiny_llama(), torch.arange(1, 13).reshape(2, 6)
    some = [{"match": {"layer": "0"}, "attention": {"kd_gqa": {"num_kv_heads": 2}}}]
    fast = reattend.optimize(model, {"version": 1, "sites": some}, {"input_ids": ids})
    assert "1 of 2 sites" in fast.ships()["hf"].reason
    every = [{"match": "*", "attention": {"kd_gqa": {"num_kv_heads": 2, "variant": "dgqa"}}}]
    fast = reattend.optimize(model, {"version": 1, "sites": every}, {"input_ids": ids})
    assert "compute something else" in fast.ships()["hf"].reason
