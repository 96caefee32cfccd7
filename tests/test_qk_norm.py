"""Normalised queries and keys against their formulas, row by row; their bound; rotation in both layouts; a llama."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import reattend
from reattend.compiler.functional import attention
from reattend.compiler.layers import Attention
from reattend.compiler.place import stand
from reattend.compiler.problem import problem
from reattend.compiler.refusal import Refused
from reattend.compiler.rotary import rotated
from reattend.passes.score.qk_norm import QkNorm


def normed(t: Tensor, w: Tensor, b: Tensor | None, m: QkNorm) -> Tensor:
    """One token at a time: the whole row of all heads, or a head's."""
    out = torch.empty_like(t)
    for x in range(t.shape[0]):
        for n in range(t.shape[2]):
            rows = [t[x, :, n].reshape(-1)] if m.scope == "full" else list(t[x, :, n])
            done = []
            for h, row in enumerate(rows):
                mean = row.mean() if m.norm == "layernorm" else 0.0
                weight = w[h] if m.per_head else w
                y = (
                    (row - mean)
                    / torch.sqrt(((row - mean) ** 2).mean() + (1e-5 if m.norm == "layernorm" else 1e-6))
                    * weight
                )
                done.append(y if b is None else y + (b[h] if m.per_head else b))
            out[x, :, n] = torch.stack(done).reshape(t.shape[1], t.shape[3])
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "m",
    [QkNorm(), QkNorm(bias=True, per_head=True), QkNorm("rmsnorm", "full", mu_p=True), QkNorm(scope="full", bias=True),
     QkNorm("rmsnorm", softcap=0.7)],
    ids=repr,
)  # fmt: skip
def test_it_is_its_formula(causal: bool, m: QkNorm) -> None:
    q, k, v = problem(7, kv_heads=2, dtype=torch.float64)
    draw = torch.Generator().manual_seed(3)
    declared = m.params(stand(q, k, v).site)
    p = {n: torch.randn(d.shape, generator=draw, dtype=torch.float64) for n, d in declared.items()}
    a, b = (normed(t, p[f"{n}_norm_weight"], p.get(f"{n}_norm_bias"), m) for n, t in (("q", q), ("k", k)))
    s = a @ b.repeat_interleave(2, 1).mT * (1 / 8 if m.mu_p else 8**-0.5)
    s = s if m.softcap is None else m.softcap * torch.tanh(s / m.softcap)
    if causal:
        s = s.masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), -torch.inf)
    expected = torch.softmax(s, -1) @ v.repeat_interleave(2, 1)
    got = attention(*(t.float() for t in (q, k, v)), m, causal=causal, params={n: t.float() for n, t in p.items()})
    assert torch.allclose(got.double(), expected, atol=1e-5)


def test_cosines_with_a_temperature() -> None:
    q, k, v = problem(7)
    heat = torch.tensor([0.0, 1.0, 3.0, 9.0])
    cosines = torch.nn.functional.cosine_similarity(q[:, :, :, None], k[:, :, None], -1)
    s = cosines * heat.clamp(max=math.log(100)).exp()[:, None, None]
    got = attention(q, k, v, "qk_norm", norm="l2", params={"temperature": heat})
    assert torch.allclose(got, torch.softmax(s, -1) @ v, atol=1e-5)


def test_logits_are_bounded() -> None:
    q, k, _ = problem(7)
    w = {"q_norm_weight": torch.randn(8), "k_norm_weight": torch.randn(8)}
    bound = 8**-0.5 * 8 * float((w["q_norm_weight"] * w["k_norm_weight"]).abs().max())
    one = torch.zeros(2, 4, 7, 7)
    for j in range(7):  # p_j / p_i = exp(s_j - s_i): weights never differ by more than twice the bound
        one[..., j] = attention(50 * q, 50 * k, torch.eye(7)[:, j : j + 1].expand(2, 4, 7, 1), "qk_norm", params=w)[
            ..., 0
        ]
    assert float((one.amax(-1) / one.amin(-1)).log().max()) <= 2 * bound + 1e-4


@pytest.mark.parametrize("interleaved", [False, True])
def test_it_comes_before_the_rotation(interleaved: bool) -> None:
    q, k, v = problem(6)
    w = {"q_norm_weight": torch.rand(8) + 0.5, "k_norm_weight": torch.rand(8) + 0.5}
    m = QkNorm(interleaved=interleaved)
    a, b = (normed(t, w[f"{n}_norm_weight"], None, m) for n, t in (("q", q), ("k", k)))
    order = torch.arange(8).reshape(2, 4).T.reshape(-1) if interleaved else torch.arange(8)  # halves as pairs
    back = order.argsort()
    turned = rotated(a[..., back], b[..., back])
    expected = attention(turned.q, turned.k, v, "softmax", causal=True)
    angles = {"cos": turned.cos[..., order], "sin": turned.sin[..., order]}
    got = attention(torch.randn_like(q), torch.randn_like(k), v, m, causal=True, params=w,
                    ports={"q_nope": q, "k_nope": k, **angles})  # fmt: skip
    assert torch.allclose(got, expected, atol=1e-5)


def test_a_cap_does_not_stand_behind_a_bias() -> None:
    q, k, v = problem(5)
    with pytest.raises(Refused, match="capped or biased already"):
        attention(q, k, v, "qk_norm", softcap=5.0, bias=torch.zeros(1, 4, 5, 5))


def test_a_layer_with_rotation_trains() -> None:
    layer = Attention("qk_norm", 32, heads=4, kv_heads=2, causal=True, rope=True, norm="rmsnorm")
    layer(torch.randn(2, 6, 32)).square().mean().backward()
    assert bool(layer.reattend.q_norm_weight.grad.any())  # type: ignore[union-attr,operator]


@pytest.mark.parametrize(
    ("knobs", "match"),
    [
        ({"norm": "batch"}, "layernorm, rmsnorm, l2"),
        ({"norm": "rmsnorm", "bias": True}, "bias with layernorm"),
        ({"norm": "l2", "scope": "full"}, "without per_head and l2"),
        ({"softcap": 0.0}, "above 0"),
    ],
)
def test_what_does_not_go_together_is_refused(knobs: dict[str, Any], match: str) -> None:
    with pytest.raises(Refused, match=match):
        QkNorm(**knobs)


def test_in_a_llama_it_is_a_qwen3() -> None:
    """qwen3 is llama with rmsnorm per head before the rotation: the same weights give the same logits."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
             "vocab_size": 60, "num_hidden_layers": 2, "head_dim": 8, "rms_norm_eps": 1e-6}  # fmt: skip
    qwen = hf.Qwen3ForCausalLM(hf.Qwen3Config(**sizes)).eval()
    llama = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)).eval()
    llama.load_state_dict(qwen.state_dict(), strict=False)
    ids = torch.randint(1, 60, (2, 7))
    recipe = {"version": 1, "sites": [{"match": "*", "attention": {"qk_norm": {"norm": "rmsnorm"}}}]}
    fast = reattend.optimize(llama, recipe, {"input_ids": ids, "use_cache": False})
    logits = fast(input_ids=ids, use_cache=False).logits
    assert torch.allclose(logits, qwen(input_ids=ids, use_cache=False).logits, atol=1e-5)
    logits.square().mean().backward()
    learned = [p for n, p in fast.named_parameters() if n.endswith("norm_weight")]
    assert len(learned) == 4 and all(t.grad is not None and t.grad.any() for t in learned)
