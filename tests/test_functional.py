"""Mechanisms on bare tensors and as layers: masks, biases, ports, own tensors, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import reattend.passes  # noqa: F401 - fills the registry
from reattend.compiler.functional import attention, attention_and_aux
from reattend.compiler.layers import Attention, module
from reattend.compiler.problem import hidden, problem
from reattend.compiler.refusal import Refused
from reattend.compiler.site import Grid


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance)


def test_masks_and_biases_are_those_of_sdpa() -> None:
    q, k, v = problem(5, 7)
    full = torch.rand(2, 4, 5, 7) > 0.3
    full[..., 0] = True
    bias = torch.randn(1, 4, 5, 7)
    assert close(attention(q, k, v, "softmax", mask=full), sdpa(q, k, v, full))
    assert close(attention(q, k, v, "softmax", mask=full[:1, :1]), sdpa(q, k, v, full[:1, :1]))
    assert close(attention(q, k, v, "softmax", bias=bias, scale=0.2), sdpa(q, k, v, bias, scale=0.2))
    padding = torch.ones(2, 7, dtype=torch.bool)
    padding[1, 4:] = False
    assert close(attention(q, k, v, "softmax", mask=padding), sdpa(q, k, v, padding[:, None, None]))


def test_causal_counts_from_the_start() -> None:
    q, k, v = problem(4, 9, kv_heads=2)
    expected = sdpa(q, k, v, is_causal=True, enable_gqa=True)
    assert close(attention(q, k, v, "softmax", causal=True), expected)


def test_a_window_is_a_band_with_sinks() -> None:
    q, k, v = problem(9)
    i, j = torch.arange(9)[:, None], torch.arange(9)
    causal = (j <= i) & ((i - j < 3) | (j < 2))
    both = ((i - j).abs() < 3) | (j < 2)
    assert close(attention(q, k, v, "window", causal=True, window=3, sinks=2), sdpa(q, k, v, causal))
    assert close(attention(q, k, v, "window", window=3, sinks=2), sdpa(q, k, v, both))
    with pytest.raises(Refused, match="cross-attention"):
        attention(q, k[:, :, :4], v[:, :, :4], "window")


@pytest.mark.parametrize("causal", [False, True])
def test_linear_attention_is_a_running_sum(causal: bool) -> None:
    q, k, v = problem(6, kv_heads=2)
    padding = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    got = attention(q, k, v, "linear", causal=causal, mask=padding)
    f_q, f_k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    f_k = (f_k * padding[:, None, :, None]).repeat_interleave(2, 1)
    kv = f_k[..., :, None] * v.repeat_interleave(2, 1)[..., None, :]  # (B, H, N, D, Dv)
    state, total = (kv.cumsum(2), f_k.cumsum(2)) if causal else (kv.sum(2, True), f_k.sum(2, True))
    expected = torch.einsum("bhnd,bhnde->bhne", f_q, state.expand_as(kv)) / (f_q * total).sum(-1, keepdim=True)
    assert close(got, expected)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"slug": "sofmax"}, "did you mean 'softmax'"),
    ({"slug": "window", "windw": 3}, "did you mean 'window'"),
    ({"slug": "window", "window": 0}, "window >= 1"),
    ({"slug": "linear", "causal": True, "k": problem(9)[1], "v": problem(9)[2]}, "this site is causal-cross"),
    ({"slug": "linear", "feature_map": "tanhh"}, "known: elu, exp, identity, relu"),
    ({"slug": "sigmoid", "sink": "k_bias", "params": {"k_snk": torch.zeros(4, 8)}}, "did you mean 'k_sink'"),
    ({"slug": "sigmoid", "sink": "k_bias", "params": {"k_sink": torch.zeros(4, 9)}}, r"fits|shape \(4, 8\)"),
    ({"slug": "agent", "causal": True}, "agent is noncausal, this site is causal-self"),
    ({"slug": "agent", "mask": torch.ones(2, 7, dtype=torch.bool)}, "does not honour padding"),
    ({"slug": "moh"}, "asks for port x"),
    ({"slug": "moh", "shared_heads": 5, "ports": {"x": hidden()}}, "this site has 4"),
    ({"slug": "poolformer"}, r"reattend\.module\('poolformer'\)"),
    ({"slug": "softmax", "mask": torch.ones(7, 7)}, "a boolean mask, or bias="),
    ({"slug": "softmax", "mask": torch.ones(7, 7, dtype=torch.bool)}, "four dimensions"),
    ({"slug": "softmax", "bias": torch.ones(2, 3, 7, 7)}, "broadcastable to"),
]


@pytest.mark.parametrize(("given", "match"), REFUSED, ids=[f"{g['slug']}-{m[:24]}" for g, m in REFUSED])
def test_refused_naming_what_fits(given: dict[str, Any], match: str) -> None:
    q, k, v = problem()
    with pytest.raises(Refused, match=match):
        attention(**{"q": q, "k": k, "v": v, **given})


def test_a_gate_reads_softmax_attention_or_the_o_that_it_is_given() -> None:
    q, k, v = problem()
    own, x = torch.randn(2, 4, 7, 8), hidden()
    knobs: dict[str, Any] = {"shared_heads": 0, "routed_heads": 2}
    params = {"w_router": torch.randn(4, 32)}
    plain, aux = attention_and_aux(q, k, v, "moh", ports={"x": x}, params=params, **knobs)
    gates = plain / sdpa(q, k, v)
    assert close(attention(q, k, v, "moh", ports={"x": x, "o": own}, params=params, **knobs), gates * own, 1e-4)
    assert set(aux.losses) == {"load_balance"}


@pytest.mark.parametrize(
    ("slug", "extra"),
    [
        ("softmax", {}),
        ("window", {"causal": True, "window": 4}),
        ("linear", {"causal": True, "kv_heads": 2}),
        ("sigmoid", {"sim": "softmax", "sink": "kv_bias"}),
        ("agent", {"grid": (3, 3, 1), "agent_num": 4}),
        ("moh", {"causal": True}),
        ("poolformer", {"causal": True}),
    ],
)
def test_a_layer_learns(slug: str, extra: dict[str, Any]) -> None:
    """A few steps of training lower the loss, and every parameter moves."""
    layer = Attention(slug, 32, heads=4, **extra)
    x, wanted = hidden(10), hidden(10, seed=5)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    if not before:  # a region without learned tensors
        assert close(layer(x), module(slug, causal=True)(x))
        return
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = (layer(x) - wanted).square().mean() + sum(layer.losses().values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    still = (
        {"k_proj.bias"} if slug in ("softmax", "window", "moh") else set()
    )  # softmax does not see a shift of all keys
    assert {name for name, p in layer.named_parameters() if torch.equal(p, before[name])} <= still


def test_a_layer_is_its_projections_around_attention() -> None:
    layer, x, other = Attention("softmax", 32, heads=4, kv_heads=2), hidden(5), hidden(7, seed=3)
    padding = torch.tensor([[True] * 7, [True] * 5 + [False] * 2])
    q = layer.q_proj(x).view(2, 5, 4, 8).transpose(1, 2)
    k, v = (proj(other).view(2, 7, 2, 8).transpose(1, 2) for proj in (layer.k_proj, layer.v_proj))
    o = sdpa(q, k, v, padding[:, None, None], enable_gqa=True)
    assert close(layer(x, other, padding), layer.o_proj(o.transpose(1, 2).reshape(2, 5, 32)))
    assert sorted(dict(Attention("agent", 32, 4, grid=(2, 2)).reattend.named_parameters()))[:2] == [
        "ah_bias",
        "an_bias",
    ]


def test_layers_refuse_what_cannot_stand() -> None:
    with pytest.raises(Refused, match="noncausal"):
        Attention("agent", 32, 4, causal=True)
    with pytest.raises(Refused, match="dim a multiple of heads"):
        Attention("softmax", 30, 4)
    with pytest.raises(Refused, match="whole|part model"):
        Attention("tome_like", 32, 4)
    with pytest.raises(Refused, match=r"reattend\.attention"):
        module("softmax")


def test_learned_tensors_that_are_not_given_start_the_same_every_time() -> None:
    q, k, v = problem()
    torch.manual_seed(1)
    first = attention(q, k, v, "sigmoid", sim="softmax", sink="kv_bias")
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(first, attention(q, k, v, "sigmoid", sim="softmax", sink="kv_bias"))
    assert torch.equal(state, torch.get_rng_state())


def test_a_grid_may_be_written_three_ways() -> None:
    q, k, v = problem(7)
    ways = [(2, 3, 1), Grid(2, 3, 1)]
    a, b = (attention(q, k, v, "agent", agent_num=1, grid=grid) for grid in ways)
    assert torch.equal(a, b)
    assert attention(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], "agent", agent_num=1, grid=(2, 3)).shape == (2, 4, 6, 8)
