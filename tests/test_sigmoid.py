"""Sigmoid, elu and kernel weights and virtual sinks, against their formulas written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import reattend.passes  # noqa: F401 - fills the registry
from reattend.compiler.functional import attention
from reattend.compiler.problem import problem
from reattend.compiler.refusal import Refused

SCALE = 8**-0.5


def parts(causal: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v = problem(7, kv_heads=2)
    seen = torch.ones(7, 7).tril() if causal else torch.ones(7, 7)
    s = SCALE * q @ k.repeat_interleave(2, 1).mT
    return q, k, v, s, seen


def with_values(w: Tensor, v: Tensor) -> Tensor:
    return w @ v.repeat_interleave(2, 1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sim", ["sigmoid", "elu"])
@pytest.mark.parametrize("normalize", [False, True, "position", "sqrt_position"])
@pytest.mark.parametrize("bias", [0.0, -1.5, "-ln(M)"])
def test_weights_without_a_softmax(causal: bool, sim: str, normalize: Any, bias: Any) -> None:
    q, k, v, s, seen = parts(causal)
    shifted = s + (-math.log(7) if bias == "-ln(M)" else bias)
    w = seen * (torch.sigmoid(shifted) if sim == "sigmoid" else torch.nn.functional.elu(shifted) + 1)
    row = torch.arange(1, 8)[:, None]
    divisor = {False: 1, True: w.sum(-1, True) + 1e-8, "position": row, "sqrt_position": row.sqrt()}[normalize]
    got = attention(q, k, v, "sigmoid", causal=causal, sim=sim, normalize=normalize, bias=bias)
    assert torch.allclose(got, with_values(w / divisor, v), atol=1e-5)


def test_the_length_of_the_bias_can_be_that_of_training() -> None:
    q, k, v, s, _ = parts(False)
    got = attention(q, k, v, "sigmoid", bias="-ln(M)", length=100, softmax_scale=0.1)
    assert torch.allclose(got, with_values(torch.sigmoid(s / SCALE * 0.1 - math.log(100)), v), atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sink", ["k_bias", "kv_bias", "v_bias", "off_by_one", "logit"])
def test_sinks_of_softmax(causal: bool, sink: str) -> None:
    q, k, v, s, seen = parts(causal)
    k_sink, v_sink, z = torch.randn(4, 8), torch.randn(4, 8), torch.randn(4)
    own = {
        "k_bias": {"k_sink": k_sink},
        "kv_bias": {"k_sink": k_sink, "v_sink": v_sink},
        "v_bias": {"v_sink": v_sink},
        "off_by_one": {},
        "logit": {"z_sink": z},
    }
    got = attention(q, k, v, "sigmoid", causal=causal, sim="softmax", sink=sink, params=own[sink])
    e = seen * torch.exp(s)
    virtual = {
        "k_bias": torch.exp(SCALE * q @ k_sink[:, :, None]),
        "kv_bias": torch.exp(SCALE * q @ k_sink[:, :, None]),
        "v_bias": torch.zeros(()),
        "off_by_one": torch.ones(()),
        "logit": torch.exp(z)[:, None, None],
    }[sink]
    total = e.sum(-1, keepdim=True) + virtual
    expected = with_values(e / total, v)
    if sink == "kv_bias":
        expected = expected + virtual / total * v_sink[:, None]
    if sink == "v_bias":
        expected = expected + v_sink[:, None]
    assert torch.allclose(got, expected, atol=1e-5)


def test_a_sink_key_without_heads_is_shared_by_all() -> None:
    q, k, v, *_ = parts(True)
    shared = torch.randn(8)
    one, each = (
        attention(q, k, v, "sigmoid", causal=True, sim="softmax", sink="k_bias", params={"k_sink": t})
        for t in (shared, shared.expand(4, 8))
    )
    assert torch.equal(one, each)
    assert bool((one.norm(dim=-1) <= attention(q, k, v, "softmax", causal=True).norm(dim=-1)).all()), "it only shrinks"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", ["linear", "elu", "mlp"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_kernel_weights(causal: bool, kernel: str, normalize: bool, scale: float | None) -> None:
    q, k, v, _, seen = parts(causal)
    draw = torch.Generator().manual_seed(2)
    shapes = {"kernel_w1": (8, 8), "kernel_b1": (8,), "kernel_w2": (8, 8), "kernel_b2": (8,)}
    p = {name: 0.3 * torch.randn(shape, generator=draw) for name, shape in shapes.items()} if kernel == "mlp" else {}

    def phi(t: Tensor) -> Tensor:
        if kernel == "mlp":
            return torch.relu(t @ p["kernel_w1"].T + p["kernel_b1"]) @ p["kernel_w2"].T + p["kernel_b2"]
        return torch.nn.functional.elu(t) + 1 if kernel == "elu" else t

    w = seen * (scale or SCALE) * (phi(q) @ phi(k).repeat_interleave(2, 1).mT)
    if normalize:
        total = w.sum(-1, keepdim=True)
        w = w / (total + 1e-8 if kernel == "elu" else total.abs().clamp(min=1))
    how: dict[str, Any] = {"kernel": kernel, "normalize": normalize, "softmax_scale": scale}
    got = attention(q, k, v, "sigmoid", causal=causal, params=p, **how)
    assert torch.allclose(got, with_values(w, v), atol=1e-5)
    sink = torch.randn(4, 8, generator=draw)
    raised = attention(q, k, v, "sigmoid", causal=causal, params=p | {"v_sink": sink}, sink="v_bias", **how)
    assert torch.allclose(raised, got + sink[:, None], atol=1e-5)


def test_masks_multiply_weights() -> None:
    q, k, v, s, _ = parts(False)
    seen = torch.rand(2, 1, 7, 7) > 0.4
    assert torch.allclose(attention(q, k, v, "sigmoid", mask=seen), with_values(seen * torch.sigmoid(s), v), atol=1e-5)


@pytest.mark.parametrize(
    ("knobs", "match"),
    [
        ({"sim": "cosine"}, "one of"),
        ({"sink": "off_by_one"}, "sim='softmax'"),
        ({"kernel": "elu", "sink": "k_bias"}, "sink='none'"),
        ({"sim": "softmax", "bias": -1.0}, "bias=0"),
        ({"bias": "-ln(N)"}, "-ln"),
    ],
)
def test_what_does_not_go_together_is_refused(knobs: dict[str, Any], match: str) -> None:
    q, k, v = problem()
    with pytest.raises(Refused, match=match):
        attention(q, k, v, "sigmoid", **knobs)


def test_a_kernel_has_no_score_for_a_bias() -> None:
    q, k, v = problem()
    with pytest.raises(Refused, match="no score for bias"):
        attention(q, k, v, "sigmoid", kernel="elu", bias=torch.zeros(1, 4, 7, 7))
