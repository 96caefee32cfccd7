"""Stick-breaking against the stick itself, broken key by key; its mixture of heads token by token; real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import reattend
from reattend.compiler.functional import attention
from reattend.compiler.layers import module
from reattend.compiler.problem import hidden, problem
from reattend.compiler.refusal import Refused
from reattend.passes.score.stickbreaking import Stickbreaking


def stick(q: Tensor, k: Tensor, v: Tensor, scale: float, current: bool, remainder: bool, seen: Tensor) -> Tensor:
    """One row: the newest key first takes sigmoid(l) of what is left."""
    o = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[1])
            for i in range(q.shape[2]):
                left = torch.ones((), dtype=q.dtype)
                for j in range(i if current else i - 1, -1, -1):
                    if seen[b, j]:
                        beta = torch.sigmoid(scale * q[b, h, i] @ k[b, g, j])
                        o[b, h, i] += left * beta * v[b, g, j]
                        left = left * (1 - beta)
                if remainder and seen[b, i]:  # what a hidden token holds comes out nowhere
                    o[b, h, i] += left * v[b, g, i]
    return o


@pytest.mark.parametrize("current", [True, False])
@pytest.mark.parametrize("remainder", [True, False])
@pytest.mark.parametrize("scale", [None, 1.3])
def test_it_is_its_formula(current: bool, remainder: bool, scale: float | None) -> None:
    q, k, v = problem(9, kv_heads=2, dtype=torch.float64)
    seen = torch.ones(2, 9, dtype=torch.bool)
    seen[1, :3] = seen[0, 4] = False
    m = Stickbreaking(current, remainder, scale)
    got = attention(*(t.float() for t in (q, k, v)), m, causal=True, mask=seen, scale=0.4)
    expected = stick(q, k, v, scale or 0.4, current, remainder, seen)
    assert torch.allclose(got.double(), expected, atol=1e-5)


def test_older_keys_never_change_the_share_of_newer_ones() -> None:
    q, k, v = problem(8)
    v[:, :, :3] = 0
    other = k.clone()
    other[:, :, :3] *= -2
    one, two = (attention(q, t, v, "stickbreaking", causal=True) for t in (k, other))
    assert torch.allclose(one, two, atol=1e-6)


def test_a_noncausal_site_is_refused() -> None:
    q, k, v = problem(5)
    with pytest.raises(Refused, match="needs the order of a causal-self site"):
        attention(q, k, v, "stickbreaking")


def written_out(x: Tensor, w: dict[str, Tensor], m: dict[str, Any], seen: Tensor) -> tuple[Tensor, Tensor]:
    """The mixture one token and one expert at a time: (y, gate probabilities)."""
    B, N, C = x.shape
    n, A, K = m["heads_per_expert"], m["att_hidden"], m["top_k"]

    def heads(t: Tensor) -> Tensor:
        return t.reshape(B, N, n, A // n).transpose(1, 2)

    if m["gate_type"] == "mlp":
        logits = torch.nn.functional.gelu(x @ w["w_gate"].T + w["b_gate"]) @ w["w_gate_out"].T
    elif m["gate_type"] == "linear":
        logits = x @ w["w_gate"].T
    else:
        logits = torch.exp(w["temperature"]) * torch.cosine_similarity(
            (x @ w["w_gate"].T)[:, :, None], w["expert_centroids"], -1
        )
    p = torch.softmax(logits, -1)
    k, v = heads(x @ w["w_k"].T + w["b_k"]), heads(x @ w["w_v"].T + w["b_v"])
    D = A // n
    outs = [
        stick(heads(x @ w["w_q_experts"][e]), k, v, D**-0.5, True, False, seen).transpose(1, 2).reshape(B, N, A)
        @ w["w_o_experts"][e]
        for e in range(m["num_experts"])
    ]
    y = torch.zeros_like(x)
    for b in range(B):
        for i in range(N):
            for e in sorted(range(m["num_experts"]), key=lambda e: (-float(p[b, i, e]), e))[:K]:
                y[b, i] += p[b, i, e] * outs[e][b, i]
    return y, p


@pytest.mark.parametrize("gate", ["mlp", "linear", "gmm"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_mixture_is_its_formula(gate: str, top_k: int) -> None:
    knobs = {
        "num_experts": 3,
        "top_k": top_k,
        "heads_per_expert": 2,
        "att_hidden": 8,
        "gate_type": gate,
        "gate_hidden": 5,
    }
    layer = module("stickbreaking_moa", dim=12, causal=True, **knobs).double()
    x = hidden(7, width=12, dtype=torch.float64)
    seen = torch.ones(2, 7, dtype=torch.bool)
    seen[1, :2] = False
    w = {name: t.detach() for name, t in layer.reattend.tensors.items()}
    y, p = written_out(x, w, knobs, seen)
    assert torch.allclose(layer(x, key_padding=seen)[seen], y[seen], atol=1e-10)
    real = p[seen]
    mean = real.mean(0)
    loss = -(real * real.log()).sum(-1).mean() + (mean * mean.log()).sum()
    assert torch.allclose(layer.losses()["mi"], 0.01 * loss, atol=1e-8)


def test_the_switch_loss_and_the_order_of_experts() -> None:
    knobs = {"num_experts": 4, "heads_per_expert": 2, "att_hidden": 8, "gate_type": "linear", "aux_loss": "switch"}
    layer = module("stickbreaking_moa", dim=12, causal=True, aux_weight=1.0, **knobs)
    x = hidden(6, width=12)
    y = layer(x)
    logits = x @ layer.reattend.tensors["w_gate"].T
    p = torch.softmax(logits, -1).flatten(0, 1)
    freq = torch.zeros_like(p).scatter(1, p.topk(2).indices, 1.0).sum(0)
    expected = 4 * (p.sum(0) / p.sum() * freq / freq.sum()).sum() + 0.1 * logits.logsumexp(-1).square().mean()
    assert torch.allclose(layer.losses()["switch"], expected, atol=1e-5)
    with torch.no_grad():
        for name in ("w_q_experts", "w_o_experts", "w_gate"):
            layer.reattend.tensors[name].copy_(layer.reattend.tensors[name].flip(0))
    assert torch.allclose(layer(x), y, atol=1e-6), "experts in another order"


def test_the_last_experts_are_drawn_while_it_trains() -> None:
    knobs = {"num_experts": 3, "heads_per_expert": 1, "att_hidden": 4, "gate_type": "linear", "sample_topk": 1}
    layer, x = module("stickbreaking_moa", dim=12, causal=True, **knobs), hidden(1, width=12, batch=1)
    sampled = {tuple(layer.train()(x)[0, 0].tolist()) for _ in range(40)}
    plain = layer.eval()(x)[0, 0]
    assert len(sampled) == 2, "the best expert and either of the others"
    assert any(torch.allclose(torch.tensor(one), plain, atol=1e-6) for one in sampled)


def test_padding_counts_in_no_expert() -> None:
    layer = module("stickbreaking_moa", dim=12, causal=True, num_experts=3, heads_per_expert=1, att_hidden=4)
    seen = torch.tensor([[True, True, False]])
    assert not layer(hidden(3, width=12, batch=1), key_padding=seen)[0, 2].any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [{"stickbreaking": {}}, {"stickbreaking_moa": {"num_experts": 3, "heads_per_expert": 2, "att_hidden": 8}}],
    ids=["attention", "mixture"],
)
def test_in_a_gpt2_it_runs_and_passes_gradients_on(recipe: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=60, n_positions=32)).eval()
    ids = torch.randint(1, 60, (2, 7))
    fast = reattend.optimize(model, {"version": 1, "sites": [{"match": "*", "attention": recipe}]}, {"input_ids": ids})
    logits = fast(input_ids=ids).logits
    logits.square().mean().backward()
    grads = {n: p.grad for n, p in fast.named_parameters()}
    own = ("w_q_experts", "w_gate_out") if "stickbreaking_moa" in recipe else ("c_attn.weight",)
    wanted = [n for n in grads if n.endswith(own)]
    assert len(wanted) == 2 * len(own) and all(bool(torch.isfinite(grads[n]).all()) and grads[n].any() for n in wanted)


def test_what_the_mixture_costs_is_a_number() -> None:
    """Rows that are routed have sizes that only a call tells; a row of quality is written with what they were."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1,
                            intermediate_size=32, vocab_size=60)  # fmt: skip
    inputs = {"input_ids": torch.randint(1, 60, (1, 64)), "use_cache": False}
    recipe = {"version": 1, "sites": [{"match": "*", "attention": "stickbreaking_moa"}]}
    fast = reattend.optimize(hf.LlamaForCausalLM(config).eval(), recipe, inputs, measure=False)
    assert {type(cost.flops) for cost in fast.report.predicted} == {float}
