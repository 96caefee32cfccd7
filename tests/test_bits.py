"""Bits by layer: what each costs alone, the best use of a budget, and the recipe that says it."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from small_models import Stack
from torch import nn

import reattend
from reattend.compiler.bits import Option, choose
from reattend.compiler.quantized_linear import QuantizedLinear, quantized_layers
from reattend.compiler.refusal import Refused

X = (torch.randn(2, 7, 32),)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_chosen_is_the_best_of_all_that_is_as_small(seed: int) -> None:
    """At every budget that some price of a byte spends exactly, brute force finds no smaller error."""
    draw = random.Random(seed)
    options = {str(layer): [Option(f"{b}", b, b, draw.random() / b) for b in (4, 8, 32)] for layer in range(5)}
    every = [(sum(o.bytes for o in c), sum(o.error for o in c)) for c in itertools.product(*options.values())]
    for price in (0.0, *(draw.random() / 10 ** draw.uniform(1, 3) for _ in range(6))):
        spent = sum(min(o, key=lambda one: one.error + price * one.bytes).bytes for o in options.values())
        chosen = choose(options, spent)
        assert sum(o.bytes for o in chosen.values()) <= spent
        assert sum(o.error for o in chosen.values()) <= min(error for size, error in every if size <= spent) + 1e-12
    between = choose(options, spent + 3).values()
    assert sum(o.bytes for o in between) <= spent + 3


def test_a_sensitive_layer_gets_the_bits() -> None:
    model = Stack().eval()
    loud = next(m for path, m in model.named_modules() if path.endswith("o_proj"))
    with torch.no_grad():
        loud.weight.mul_(30)  # type: ignore[operator]
    found = reattend.plan_bits(model, X, bits=8.2, schemes=[{"w4a16": {"group_size": 32}}, "w8"])
    errors = {path: max(o.error for o in options) for path, options in found.options.items()}
    worst = max(errors, key=lambda path: errors[path])
    assert found.chosen[worst].scheme.startswith(("W8", "keep"))
    assert found.bits <= 8.2 < max(8 * o.bytes / found.weights[worst] for o in found.options[worst])
    fast = reattend.optimize(model, found.recipe, X, measure=False)
    schemes = {path: layer.scheme for path, layer in quantized_layers(fast).items()}
    assert schemes == {path: option.scheme for path, option in found.chosen.items() if option.scheme != "keep"}
    assert worst in found.text()


def test_the_model_is_as_it_was_and_a_small_budget_is_refused() -> None:
    model = Stack().train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(Refused, match=r"3 bits a weight: 8\.\d\d or more"):
        reattend.plan_bits(model, X, bits=3)
    assert model.training and not any(isinstance(m, QuantizedLinear) for m in model.modules())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    with pytest.raises(Refused, match="no linear layer"):
        reattend.plan_bits(nn.LayerNorm(32), X, bits=8)
    with pytest.raises(Refused, match="no scheme of weights"):
        reattend.plan_bits(model, X, bits=8, schemes=["window"])


def test_weights_that_two_layers_share_stay() -> None:
    first, second = nn.Linear(32, 32), nn.Linear(32, 32)
    second.weight = first.weight
    model = nn.Sequential(first, second, nn.Linear(32, 32)).eval()
    found = reattend.plan_bits(model, X, bits=9, schemes=["w8"])
    assert list(found.chosen) == ["2"] and found.shared == ("0", "1")
    assert list(found.recipe.to_dict()["quantize"]) == ["0", "1", "*"]
