"""Quantized layers through recipes: which, saved and loaded, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import Stack

import reattend
from reattend.compiler.mechanism import mechanism
from reattend.compiler.primitives.qlinear_spec import unpacked, whole_weights
from reattend.compiler.quantized_linear import QuantizedLinear, quantized_layers
from reattend.compiler.refusal import Refused

X = (torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0)),)


def quantized(model: torch.nn.Module, wishes: Any) -> Any:
    return reattend.optimize(model, {"version": 1, "quantize": wishes}, X, measure=False)


@pytest.mark.parametrize("scheme", ["w8", "w8a8", {"w4a16": {"group_size": 16}}, {"qserve": {"group_size": 16}}])
def test_layers_are_replaced_and_come_back_from_a_folder(scheme: Any, tmp_path: Path) -> None:
    model = Stack().eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    fast = quantized(model, {"**.o_proj": "keep", "*": scheme})
    layers = quantized_layers(fast)
    assert len(layers) == 15 and not any("o_proj" in path for path in layers)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert not any(n.endswith("q_proj.weight") for n in fast.state_dict())
    y, error = fast(*X), float((fast(*X) - model(*X)).detach().norm() / model(*X).detach().norm())
    assert 0 < error < 0.2
    reattend.save(fast, tmp_path)
    assert torch.equal(reattend.load(tmp_path, Stack())(*X), y)


@pytest.mark.parametrize("kind", ["random", "outlier", "constant", "negative", "zero", "tiny"])
def test_progressive_groups_stay_in_eight_bits(kind: str) -> None:
    w = torch.randn(8, 64)
    if kind == "outlier":
        w[:, 5] *= 1e3
    w = {"constant": w * 0 + 3.0, "negative": -w.abs() - 1, "zero": w * 0, "tiny": w * 1e-30}.get(kind, w)
    layer: QuantizedLinear = mechanism("qserve", group_size=16).layer(w)  # type: ignore[attr-defined]
    whole = whole_weights([getattr(layer, n) for n in layer.spec.names], layer.spec)
    assert torch.equal(whole, whole.round()) and whole.min() >= -128 and whole.max() <= 127
    assert layer.weight.isfinite().all()


def test_bad_weights_group_sizes_and_quantizing_twice_are_refused() -> None:
    broken = Stack().eval()
    broken.layers[0].attn.q_proj.weight.data[0, 0] = torch.nan  # type: ignore[union-attr,index,operator]
    with pytest.raises(Refused, match="1 weights that are no finite numbers"):
        quantized(broken, {"layers.0.attn.q_proj": "w8"})
    with pytest.raises(Refused, match="group_size 24 does not divide 32 inputs"):
        quantized(Stack().eval(), {"*": {"w4a16": {"group_size": 24}}})
    with pytest.raises(Refused, match="no linear layer matches"):
        quantized(Stack().eval(), {"nowhere": "w8"})
    twice = quantized(quantized(Stack().eval(), "w8"), "w8a8")
    assert any("quantized already" in line for line in twice.report.warnings)


def test_products_with_codes_cost_what_products_cost_and_fewer_bytes() -> None:
    before, after = quantized(Stack().eval(), {"*": "w8"}).report.predicted
    assert after.products == before.products > 0 and after.bytes < before.bytes


def test_a_cast_leaves_codes_and_scales() -> None:
    layer: Any = mechanism("w8").layer(torch.randn(4, 8))  # type: ignore[attr-defined]
    layer.to(torch.bfloat16)
    assert (layer.codes.dtype, layer.scale.dtype) == (torch.int8, torch.float32)


@pytest.mark.parametrize("scheme", ["w4a16", "qserve"])
def test_rounding_that_makes_up_for_itself_loses_less(scheme: str) -> None:
    draw = torch.Generator().manual_seed(0)
    mix = torch.randn(64, 64, generator=draw) * torch.logspace(-1, 1, 64)
    x, w = torch.randn(500, 64, generator=draw) @ mix, torch.randn(24, 64, generator=draw)
    x[:, 7] = 0  # an input that is never there
    gram = x.double().T @ x.double() / len(x)
    make = lambda **knobs: mechanism(scheme, group_size=16, **knobs)
    lost = [
        float((x @ (layer.weight - w).T).norm())
        for layer in (make().layer(w), make(rounding="gptq").layer(w, None, gram))  # type: ignore[attr-defined]
    ]
    assert lost[1] < 0.8 * lost[0]
    with pytest.raises(Refused, match="nothing is known of what it reads.*calibrate"):
        make(rounding="gptq").layer(w)  # type: ignore[attr-defined]


@pytest.mark.parametrize("scheme", ["w4a16", "qserve"])
def test_rounding_that_makes_up_for_itself_goes_column_by_column(scheme: str) -> None:
    """GPTQ as it is written, without blocks: errors are made up for in the space of whole numbers, inputs that are
    never there count as 1 beside 2 X^T X / n, and what is beyond the protected range at the start is nobody's error."""
    draw = torch.Generator().manual_seed(3)
    x = (torch.randn(300, 256, generator=draw) @ torch.randn(256, 256, generator=draw) / 40).double()
    w = torch.randn(64, 256, generator=draw) + 1
    x[:, 5:90] = 0
    gram = x.T @ x / len(x)
    layer: Any = mechanism(scheme, group_size=32, rounding="gptq").layer(w, None, gram)  # type: ignore[attr-defined]
    codes = unpacked(layer.codes, 256)
    nested = layer.spec.format == "qoq"
    left = (w / layer.scale.float()[:, None]).clamp(-120, 120).double() if nested else w.double()
    scale, zero = ((layer.step if nested else layer.scale).double(), layer.zero.double())
    H = 2 * gram
    idle = H.diagonal() == 0
    H[idle, idle], left[:, idle] = 1, 0
    order = H.diagonal().argsort(descending=True, stable=True)
    H, left = H[order][:, order], left[:, order]
    H += 0.01 * H.diagonal().mean() * torch.eye(256, dtype=torch.float64)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    for c, where in enumerate(order.tolist()):
        s, z = scale[:, where // 32], zero[:, where // 32]
        column = left[:, c].clamp(-120, 120) if nested else left[:, c]
        code = ((column + z) / s).round().clamp(0, 15)
        assert torch.equal(codes[:, where].double(), code)
        left = left - ((left[:, c] - (code * s - z)) / U[c, c])[:, None] * U[c]


def test_it_is_fitted_to_calls() -> None:
    wishes = {"**.o_proj": "keep", "*": {"qserve": {"group_size": 16, "rounding": "gptq"}}}
    fast = quantized(Stack().eval(), wishes)
    assert any("fitted to the example inputs" in line for line in fast.report.warnings)
    plain = quantized(Stack().eval(), {"**.o_proj": "keep", "*": {"qserve": {"group_size": 16}}})
    codes = [layers["layers.0.mlp.0"].codes for layers in map(quantized_layers, (fast, plain))]
    assert not torch.equal(*codes)


@pytest.mark.parametrize("scheme", ["w8", {"w4a16": {"group_size": 16, "rounding": "gptq"}}])
def test_weights_that_lie_in_columns(scheme: Any, tmp_path: Path) -> None:
    """gpt2's layers are Conv1D: x W instead of x W^T."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=64, bos_token_id=0,
                                     eos_token_id=0)  # fmt: skip
    model, call = transformers.GPT2LMHeadModel(config).eval(), {"input_ids": torch.randint(0, 64, (2, 9))}
    fast = reattend.optimize(model, {"version": 1, "quantize": {"lm_head": "keep", "*": scheme}}, call, measure=False)
    assert len(quantized_layers(fast)) == 4
    seen: list[torch.Size] = []
    fast.transformer.h[0].mlp.c_fc.register_forward_hook(lambda _, given, y: seen.append(y.shape))
    expected, got = model(**call).logits, fast(**call).logits
    assert 0 < float((got - expected).detach().norm() / expected.detach().norm()) < 0.2
    assert seen == [torch.Size([2, 9, 128])]
    reattend.save(fast, tmp_path)
    again = reattend.load(tmp_path, transformers.GPT2LMHeadModel(config).eval())
    assert torch.equal(again(**call).logits, got)
