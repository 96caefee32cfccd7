"""The memory of Titans against its definition: autograd's gradient of every chunk, one step after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, rms_norm

import reattend.passes  # noqa: F401 - fills the registry
from reattend.compiler.layers import Module, module
from reattend.compiler.problem import hidden
from reattend.compiler.refusal import Refused


def made(**knobs: Any) -> Module:
    torch.manual_seed(0)
    layer = module("titans", dim=6, causal=True, **knobs)
    for tensor in layer.parameters():
        torch.nn.init.normal_(tensor, std=0.4)
    return layer


def by_steps(layer: Module, x: Tensor, size: int, batch: int | None) -> Tensor:
    """One head, a sample at a time; the weights are kept as a list: gamma, then the matrices."""
    p = layer.reattend.tensors

    def net(weights: list[Tensor], rows: Tensor) -> Tensor:
        y = rows @ weights[1]
        for w in weights[2:]:
            y = gelu(y) @ w
        return rows + (weights[0] + 1) * layer_norm(y, y.shape[-1:])

    outputs = []
    for sample in x:
        depth = sum(name.startswith("init_model_weights") for name in p)
        now = [p["init_norm_gamma"][0], *(p[f"init_model_weights_{n}"][0] for n in range(depth))]
        base, speed, history = now, [torch.zeros_like(w) for w in now], [now]
        stored = rms_norm(sample, (6,)) * p["store_norm"]
        for c in range(len(sample) // size):
            rows = stored[c * size : (c + 1) * size]
            k, v = linear(rows, p["to_keys"]), linear(rows, p["to_values"])
            theta = torch.sigmoid(linear(rows, p["to_adaptive_step"], p["to_adaptive_step_bias"]))[:, 0]
            eta, alpha = (
                torch.sigmoid(linear(rows.mean(0), p[n], p[f"{n}_bias"])) for n in ("to_momentum", "to_decay_factor")
            )
            at = [w.detach().requires_grad_() for w in base]
            loss = (theta * (net(at, k) - v).square().mean(-1)).sum()
            speed = [eta * s - g for s, g in zip(speed, torch.autograd.grad(loss, at), strict=True)]
            now = [(1 - alpha) * w + s for w, s in zip(now, speed, strict=True)]
            history.append(now)
            if batch and (c + 1) * size % batch == 0:
                base = now
        q = linear(rms_norm(sample, (6,)) * p["retrieve_norm"], p["to_queries"])
        outputs.append(torch.stack([net(history[(n + 1) // size], q[n]) for n in range(len(sample))]))
    return torch.stack(outputs).detach()


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(("size", "batch"), [(1, None), (3, None), (2, 4), (2, 2)])
def test_the_memory_is_its_definition(depth: int, size: int, batch: int | None) -> None:
    layer = made(chunk_size=size, batch_size=batch, memory_depth=depth, expansion_factor=2.0)
    x = hidden(11, width=6)
    expected = by_steps(layer, x, size, batch)
    assert (layer(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("variant", ["mac", "mag", "mal"])
def test_layers_with_a_memory_never_look_ahead(variant: str) -> None:
    layer = made(variant=variant, chunk_size=2, segment=4, window=3, expansion_factor=1.0, max_lr=0.1)
    x = hidden(11, width=6)
    y = layer(x)
    assert y.shape == x.shape
    for t in range(1, 11):
        later = torch.cat((x[:, :t], x[:, t:] + 1), 1)
        assert (layer(later)[:, :t] - y[:, :t]).abs().max() <= 1e-5 * y.abs().max()
    assert (layer(torch.cat((x[:, :1] + 1, x[:, 1:]), 1))[:, -1] - y[:, -1]).abs().max() > 1e-5  # and remember


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(Refused, match="segments of whole chunks"):
        module("titans", dim=6, causal=True, variant="mac", chunk_size=3, segment=4)
    with pytest.raises(Refused, match="remembers what came before"):
        module("titans", dim=6)(hidden(3, width=6))
