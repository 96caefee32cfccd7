"""Lightning attention against loops over rows, in every dialect, and token by token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from linear_swaps import assert_swapped
from torch import Tensor

import reattend.passes  # noqa: F401 - fills the registry
from reattend.compiler.decode import Decoder
from reattend.compiler.functional import attention
from reattend.compiler.mechanism import mechanism
from reattend.compiler.problem import problem
from reattend.compiler.refusal import Refused
from reattend.compiler.site import Site


def silu(t: Tensor) -> Tensor:
    return t / (1 + torch.exp(-t))


def rows(q: Tensor, k: Tensor, v: Tensor, slopes: list[float], theta: Tensor | None = None) -> Tensor:
    """One head and one row at a time, the sum over m <= n written out."""
    o = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for h in range(q.shape[1]):
        for n in range(q.shape[2]):
            for m in range(n + 1):
                turn = torch.cos((n - m) * theta[h]) if theta is not None else 1.0
                s = (q[:, h, n] * k[:, h, m] * turn).sum(-1, keepdim=True)
                o[:, h, n] += math.exp(-slopes[h] * (n - m)) * s * v[:, h, m]
    return o


def normed(o: Tensor, norm: str, p: dict[str, Tensor]) -> Tensor:
    o = o.transpose(1, 2).flatten(2)
    if norm == "layernorm":
        o = (o - o.mean(-1, True)) / (o.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return o * p["weight"] + p["bias"]
    o = o / (o.square().mean(-1, True) + 1e-6).sqrt()
    return o * p["norm_weight"] if norm == "rmsnorm" else o


def heads(t: Tensor, size: int) -> Tensor:
    return t.unflatten(2, (size, -1)).transpose(1, 2)


@pytest.mark.parametrize("n", [1, 6, 67])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_bare_op(n: int, kv_heads: int) -> None:
    q, k, v = problem(n, kv_heads=kv_heads, dtype=torch.float64)
    got = attention(q, k, v, "lightning", causal=True)
    k, v = (t.repeat_interleave(4 // kv_heads, 1) for t in (k, v))
    expected = rows(q, k, v, [1 / 4, 1 / 16, 1 / 64, 1 / 256])
    assert torch.allclose(got, expected, atol=1e-10)
    single = attention(q.float(), k.float(), v.float(), "lightning", causal=True, block=16)
    assert torch.allclose(single, expected.float(), atol=1e-5 * (1 + float(expected.abs().max())))


def test_slopes_by_number_of_heads_and_layer() -> None:
    def slopes(heads: int, index: int = 0, **knobs: Any) -> list[float]:
        site = Site("", index, heads, heads, 8, 8, 1.0, "causal-self")
        made = torch.empty(heads)
        mechanism("lightning", **knobs).buffers(site)["slopes"].init(made)
        return made.tolist()

    assert slopes(8) == [2.0**-h for h in range(1, 9)]
    six = [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]
    assert slopes(6) == pytest.approx(six)
    assert slopes(6, slope_rule="minimax") == pytest.approx([2 ** (-8 * h / 6) for h in range(1, 7)])
    assert slopes(6, layer=3, layers=5) == pytest.approx([s * (1 / 4 + 1e-5) for s in six])
    assert slopes(6, index=4, layers=5) == pytest.approx([s * 1e-5 for s in six])
    minimax = slopes(4, layer=3, layers=5, slope_rule="minimax")
    assert minimax == pytest.approx([s * (1 - 3 / 4.00001 + 1e-5) for s in six[:4]])
    assert slopes(1, layers=1) == pytest.approx([2**-8 * (1 + 1e-5)])


DIALECTS: dict[str, dict[str, Any]] = {
    "TNL": {"act": "silu_qkv", "norm": "layernorm", "gate": "sigmoid"},
    "TransNormerLLM": {"act": "silu_qk", "norm": "simple_rmsnorm", "gate": "linear", "lrpe": True},
    "MiniMax": {"act": "silu_qkv", "norm": "rmsnorm", "gate": "sigmoid", "slope_rule": "minimax"},
}


def learned(knobs: dict[str, Any]) -> dict[str, Tensor]:
    names = {"layernorm": ("weight", "bias"), "rmsnorm": ("norm_weight",), "simple_rmsnorm": ()}[knobs["norm"]]
    p = {name: torch.randn(32, dtype=torch.float64) for name in names}
    return p | ({"lrpe_theta": torch.randn(4, 8, dtype=torch.float64)} if knobs.get("lrpe") else {})


@pytest.mark.parametrize("name", list(DIALECTS))
def test_dialects(name: str) -> None:
    knobs = DIALECTS[name]
    q, k, v = problem(11, dtype=torch.float64)
    p, u = learned(knobs), torch.randn(2, 4, 11, 8, dtype=torch.float64)
    got = attention(q, k, v, "lightning", causal=True, params=p, ports={"gate": u}, **knobs)
    value = silu(v) if knobs["act"] == "silu_qkv" else v
    o = rows(silu(q), silu(k), value, [1 / 4, 1 / 16, 1 / 64, 1 / 256], p.get("lrpe_theta"))
    opened = torch.sigmoid(u) if knobs["gate"] == "sigmoid" else u
    expected = heads(normed(o, knobs["norm"], p), 4) * opened
    assert torch.allclose(got, expected, atol=1e-8)


@pytest.mark.parametrize("rank", [0, 3])
def test_the_gate_from_the_hidden_state(rank: int) -> None:
    q, k, v = problem(5)
    x = torch.randn(2, 5, 20)
    p = {"gate_bias": torch.randn(32)}
    down, up, weight = torch.randn(3, 20), torch.randn(32, 3), torch.randn(32, 20)
    p |= {"gate_down": down, "gate_up": up} if rank else {"gate_weight": weight}
    u = x @ (up @ down if rank else weight).T + p["gate_bias"]
    plain = attention(q, k, v, "lightning", causal=True)
    got = attention(q, k, v, "lightning", causal=True, gate="sigmoid", gate_rank=rank, params=p, ports={"x": x})
    expected = plain * heads(torch.sigmoid(u), 4)
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_minimax_is_that_of_transformers() -> None:
    from transformers.models.minimax import modeling_minimax as minimax

    settings = dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=4, block_size=4)
    layer = minimax.MiniMaxLightningAttention(
        minimax.MiniMaxConfig(**settings, vocab_size=9, layer_types=["linear_attention"] * 4), 2
    )
    layer.norm.weight.data.normal_()
    x = torch.randn(2, 11, 32)
    expected = layer(x, (x, x), None)[0]
    qkv = layer.qkv_proj(x).view(2, 11, 4, 24).transpose(1, 2)
    gate = heads(layer.output_gate(x), 4)
    got = attention(*qkv.split(8, -1), "lightning", causal=True, layer=2, layers=4, ports={"gate": gate},
                    params={"norm_weight": layer.norm.weight}, **DIALECTS["MiniMax"])  # fmt: skip
    assert torch.allclose(layer.out_proj(got.transpose(1, 2).flatten(2)), expected, atol=1e-5)


def test_padding_has_no_value_and_documents_start_anew() -> None:
    q, k, v = problem(8)
    real = torch.ones(2, 8, dtype=torch.bool)
    real[0, 2:4] = False
    zeroed = v * real[:, None, :, None]
    assert torch.allclose(attention(q, k, v, "lightning", causal=True, mask=real),
                          attention(q, k, zeroed, "lightning", causal=True), atol=1e-6)  # fmt: skip
    packed = attention(q, k, v, "lightning", causal=True, ports={"documents": torch.tensor([0] * 5 + [1] * 3)})
    apart = [attention(q[:, :, s], k[:, :, s], v[:, :, s], "lightning", causal=True) for s in (slice(5), slice(5, 8))]
    assert torch.allclose(packed, torch.cat(apart, 2), atol=1e-5)


@pytest.mark.parametrize("knobs", [{}, {"lrpe": True, "act": "silu_qk", "norm": "simple_rmsnorm"}, {"decay": False}])
def test_decoding_keeps_one_state(knobs: dict[str, Any]) -> None:
    q, k, v = problem(9)
    site = Site("layer", 0, heads=4, kv_heads=4, dim=8, v_dim=8, scale=8**-0.5, pattern="causal-self")
    decoder = Decoder(mechanism("lightning", **knobs), site)
    parts = [decoder.prefill(q[:, :, :4], k[:, :, :4], v[:, :, :4])]
    parts += [decoder.step(q[:, :, n : n + 1], k[:, :, n : n + 1], v[:, :, n : n + 1]) for n in range(4, 9)]
    whole = attention(q, k, v, "lightning", causal=True, **knobs)
    assert (torch.cat(parts, 2) - whole).abs().max() <= 1e-6 * whole.abs().max()
    width = 16 if knobs.get("lrpe") else 8
    assert decoder.state_bytes == 2 * 4 * width * 8 * 4


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = problem(4)
    with pytest.raises(Refused, match="causal-self"):
        attention(q, k, v, "lightning")
    with pytest.raises(Refused, match="asks for port gate"):
        attention(q, k, v, "lightning", causal=True, gate="linear")
    with pytest.raises(Refused, match="layer 4 of layers=4"):
        attention(q, k, v, "lightning", causal=True, layer=4, layers=4)
    with pytest.raises(Refused, match="one of none, layernorm"):
        attention(q, k, v, "lightning", causal=True, norm="batchnorm")


def test_in_a_llama() -> None:
    rule = {"lightning": {"act": "silu_qkv", "norm": "layernorm", "gate": "sigmoid", "gate_rank": 4, "layers": 2}}
    tensors = {"weight", "bias", "gate_down", "gate_up", "gate_bias"}
    assert_swapped("llama", rule, tensors, idle={"gate_down"})  # gate_up starts at 0
