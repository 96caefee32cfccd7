"""Temperatures and value gates against their formulas, row by row; padding; where x is missing; a real model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import reattend
from reattend.compiler.decode import Decoder
from reattend.compiler.functional import attention
from reattend.compiler.place import stand, started
from reattend.compiler.problem import hidden, problem
from reattend.compiler.refusal import Refused
from reattend.compiler.site import Site
from reattend.passes.score.ssa import Ssa


def warmth(m: Ssa, alpha: float) -> float:
    return {"sigmoid": 1 / (1 + math.exp(-alpha)), "exp": math.exp(-math.exp(alpha)), "linear": alpha}[m.pos_param]


def read(name: str, projected: Tensor, x: Tensor, p: dict[str, Tensor], m: Ssa, b: int, i: int) -> Tensor:
    """tanh f of one token."""
    token = projected[b, :, i].reshape(-1) if m.temp_shared else p[f"temp_proj_{name}"] @ x[b, i]
    return torch.tanh((p[f"temp_weight_{name}"][0] * torch.nn.functional.gelu(token)).sum())


def written_out(
    q: Tensor, k: Tensor, v: Tensor, x: Tensor, p: dict[str, Tensor], m: Ssa, causal: bool, seen: Tensor
) -> Tensor:
    B, H, N, D = q.shape
    o = torch.zeros_like(q)
    c = warmth(m, float(p["pos_alpha"])) if m.pos_temp else 0.0
    for b in range(B):
        for h in range(H):
            g = h // (H // k.shape[1])
            for i in range(N):
                keys = [j for j in range(i + 1 if causal else N) if seen[b, j]]
                t = 1 + c * math.log(len(keys)) + (read("q", q, x, p, m, b, i) if m.token_temp else 0)
                w = torch.softmax(t * (k[b, g, keys] @ q[b, h, i]) / D**0.5, 0)
                for weight, j in zip(w, keys, strict=True):
                    u = 1 + (read("v", v, x, p, m, b, j) if m.value_temp else 0)
                    if m.value_pos:
                        u = u + c * math.log(int(seen[b, : j + 1].sum()) if causal else len(keys))
                    o[b, h, i] += weight * u * v[b, g, j]
    return o


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "m",
    [Ssa(), Ssa(pos_param="exp", value_pos=True), Ssa(pos_param="linear", temp_shared=False), Ssa(False),
     Ssa(token_temp=False, value_temp=False), Ssa(False, value_temp=False, temp_shared=False)],
    ids=repr,
)  # fmt: skip
def test_it_is_its_formula(causal: bool, m: Ssa) -> None:
    q, k, v = problem(8, kv_heads=2, dtype=torch.float64)
    x = hidden(8, width=20, dtype=torch.float64)
    draw = torch.Generator().manual_seed(3)
    declared = m.params(stand(q, k, v, ports={"x": x}).site)
    p = {n: 0.4 * torch.randn(d.shape, generator=draw, dtype=torch.float64) for n, d in declared.items()}
    seen = torch.ones(2, 8, dtype=torch.bool)
    seen[1, 5:] = False
    got = attention(*(t.float() for t in (q, k, v)), m, causal=causal, mask=seen, ports={"x": x.float()},
                    params={n: t.float() for n, t in p.items()})  # fmt: skip
    assert torch.allclose(got.double(), written_out(q, k, v, x, p, m, causal, seen), atol=1e-5)


@pytest.mark.parametrize("pos_param", ["sigmoid", "exp", "linear"])
def test_it_starts_as_softmax_and_is_not_stuck_there(pos_param: str) -> None:
    q, k, v = problem(7)
    m = Ssa(pos_param=pos_param)
    p = {n: t.requires_grad_() for n, t in started(m.params(stand(q, k, v).site), q).items()}
    o = attention(q, k, v, m, causal=True, params=p)
    assert torch.allclose(o, attention(q, k, v, "softmax", causal=True), atol=1e-3)
    o.square().sum().backward()
    assert all(t.grad is not None and bool(t.grad.any()) for t in p.values())


def test_a_warmer_row_is_less_even() -> None:
    q, k, v = problem(12)
    entropies = []
    for alpha in (-3.0, 0.0, 3.0):
        c = 1 / (1 + math.exp(-alpha))
        w = torch.softmax((q @ k.mT)[:, :, -1] * 8**-0.5 * (1 + c * math.log(12)), -1)
        m = Ssa(token_temp=False, value_temp=False)
        got = attention(
            q, k, torch.eye(12).expand(2, 4, 12, 12), m, causal=True, params={"pos_alpha": torch.tensor([alpha])}
        )
        assert torch.allclose(got[:, :, -1], w, atol=1e-5)
        entropies.append(float(-(w * w.log()).sum(-1).mean()))
    assert entropies == sorted(entropies, reverse=True)


def test_it_decodes_from_its_place() -> None:
    q, k, v = problem(9, kv_heads=2)
    site = Site("layer", 0, heads=4, kv_heads=2, dim=8, v_dim=8, scale=8**-0.5, pattern="causal-self")
    m = Ssa(value_pos=True)
    draw = torch.Generator().manual_seed(3)
    p = {n: 0.4 * torch.randn(d.shape, generator=draw) for n, d in m.params(site).items()}
    decoder = Decoder(m, site, params=p)
    parts = [decoder.prefill(q[:, :, :4], k[:, :, :4], v[:, :, :4])]
    parts += [decoder.step(*(t[:, :, n : n + 1] for t in (q, k, v))) for n in range(4, 9)]
    assert torch.allclose(torch.cat(parts, 2), attention(q, k, v, m, causal=True, params=p), atol=1e-5)


@pytest.mark.parametrize(
    ("knobs", "match"),
    [
        ({"pos_param": "tanh"}, "one of sigmoid"),
        ({"value_pos": True, "pos_temp": False}, "with pos_temp"),
        ({"temp_shared": False}, "asks for port x"),
    ],
)
def test_what_does_not_go_together_is_refused(knobs: dict[str, Any], match: str) -> None:
    q, k, v = problem()
    with pytest.raises(Refused, match=match):
        attention(q, k, v, "ssa", **knobs)


@pytest.mark.parametrize("shared", [True, False])
def test_in_a_llama_it_starts_near_the_model_and_learns(shared: bool) -> None:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
                       vocab_size=60, num_hidden_layers=2)
    ).eval()  # fmt: skip
    ids = torch.randint(1, 60, (2, 7))
    recipe = {"version": 1, "sites": [{"match": "*", "attention": {"ssa": {"temp_shared": shared}}}]}
    fast = reattend.optimize(model, recipe, {"input_ids": ids})
    logits = fast(input_ids=ids).logits
    assert torch.allclose(logits, model(input_ids=ids).logits, atol=1e-3)
    logits.square().mean().backward()
    learned = [p for n, p in fast.named_parameters() if n.endswith(("pos_alpha", "temp_weight_q", "temp_weight_v"))]
    assert len(learned) == 6 and all(t.grad is not None and t.grad.any() for t in learned)
