"""Complex phases against the triple sum of cosines; rotation as its start, on tensors and in a llama; refusals."""

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
from reattend.passes.score.complexformer import Complexformer


def written_out(q: Tensor, k: Tensor, v: Tensor, p: dict[str, Tensor], m: Complexformer, causal: bool) -> Tensor:
    B, H, N, D = q.shape
    o = torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            g = h // (H // k.shape[1])
            for i in range(N):
                logits = []
                for j in range(i + 1 if causal else N):
                    total = 0.0
                    for c in range(D // 2):
                        (a1, b1), (a2, b2) = ((float(t[c]), float(t[c + D // 2])) for t in (q[b, h, i], k[b, g, j]))
                        r = math.sqrt(a1**2 + b1**2 + m.eps) * math.sqrt(a2**2 + b2**2 + m.eps)
                        phase = float(p["delta"][h, c]) * (math.atan2(b1, a1) - math.atan2(b2, a2))
                        total += r * math.cos(phase + float(p["phase_bias"][h, c]) + (i - j) * m.base ** (-2 * c / D))
                    logits.append(total * (D**-0.5 if m.softmax_scale is None else m.softmax_scale))
                w = torch.softmax(torch.tensor(logits, dtype=q.dtype), 0)
                o[b, h, i] = w @ v[b, g, : len(logits)]
    return o


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "m", [Complexformer(), Complexformer(20.0, 0.3, 0.1), Complexformer(softmax_scale=None)], ids=repr
)
def test_it_is_its_formula(causal: bool, m: Complexformer) -> None:
    q, k, v = problem(6, kv_heads=2, dtype=torch.float64)
    draw = torch.Generator().manual_seed(3)
    p = {name: torch.randn(4, 4, generator=draw, dtype=torch.float64) for name in ("delta", "phase_bias")}
    got = attention(*(t.float() for t in (q, k, v)), m, causal=causal, params={n: t.float() for n, t in p.items()})
    assert torch.allclose(got.double(), written_out(q, k, v, p, m, causal), atol=1e-5)


def test_turning_queries_and_keys_alike_changes_nothing() -> None:
    q, k, v = problem(6)

    def turned(t: Tensor) -> Tensor:
        a, b = t.chunk(2, -1)
        return torch.cat((a * math.cos(0.2) - b * math.sin(0.2), a * math.sin(0.2) + b * math.cos(0.2)), -1)

    one, other = (attention(t(q), t(k), v, "complexformer", causal=True) for t in (lambda x: x, turned))
    assert torch.allclose(one, other, atol=1e-5)


def test_a_zero_query_has_finite_gradients() -> None:
    q, k, v = problem(5)
    q[:, :, 2] = 0
    k[:, :, 1, ::4] = 0
    q, k = q.requires_grad_(), k.requires_grad_()
    attention(q, k, v, "complexformer").square().sum().backward()
    assert bool(torch.isfinite(q.grad).all()) and bool(torch.isfinite(k.grad).all())


def test_it_decodes_from_its_place() -> None:
    q, k, v = problem(9, kv_heads=2)
    site = Site("layer", 0, heads=4, kv_heads=2, dim=8, v_dim=8, scale=8**-0.5, pattern="causal-self")
    p = {"delta": torch.full((4, 4), 0.8), "phase_bias": torch.full((4, 4), 0.2)}
    decoder = Decoder(Complexformer(), site, params=p)
    parts = [decoder.prefill(q[:, :, :4], k[:, :, :4], v[:, :, :4])]
    parts += [decoder.step(*(t[:, :, n : n + 1] for t in (q, k, v))) for n in range(4, 9)]
    whole = attention(q, k, v, "complexformer", causal=True, params=p)
    assert torch.allclose(torch.cat(parts, 2), whole, atol=1e-5)


def test_what_it_cannot_turn_is_refused() -> None:
    q, k, v = problem(5, dim=7)
    with pytest.raises(Refused, match="heads of 7 do not halve"):
        attention(q, k, v, "complexformer")


def test_a_llama_is_converted_without_loss_and_learns() -> None:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
                       vocab_size=60, num_hidden_layers=1)
    ).eval()  # fmt: skip
    ids = torch.randint(1, 60, (2, 9))
    knobs = {"softmax_scale": None, "base": 10000.0}
    recipe = {"version": 1, "sites": [{"match": "*", "attention": {"complexformer": knobs}}]}
    fast = reattend.optimize(model, recipe, {"input_ids": ids, "use_cache": False})
    logits = fast(input_ids=ids, use_cache=False).logits
    assert torch.allclose(logits, model(input_ids=ids).logits, atol=1e-5)
    logits.square().mean().backward()
    learned = [p for n, p in fast.named_parameters() if n.endswith(("delta", "phase_bias"))]
    assert len(learned) == 2 and all(t.grad is not None and t.grad.any() for t in learned)
