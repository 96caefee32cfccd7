"""The memory of Titans against its definition: autograd's gradient of every chunk, one step after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, rms_norm, silu

import reattend.passes  # noqa: F401 - fills the registry
from reattend.compiler.decode import Decoder
from reattend.compiler.layers import Module, module
from reattend.compiler.place import layer_site
from reattend.compiler.problem import hidden
from reattend.compiler.refusal import Refused


def made(**knobs: Any) -> Module:
    torch.manual_seed(0)
    layer = module("titans", dim=6, causal=True, **knobs)
    for tensor in layer.parameters():
        torch.nn.init.normal_(tensor, std=0.4)
    return layer


def by_steps(layer: Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """A sample and a head at a time, in float64; the weights are kept as a list: gamma, then the matrices."""
    m: Any = layer.mechanism
    p = {name: tensor.double() for name, tensor in layer.reattend.tensors.items()}
    dim, (reads, size) = m.dim_head or 6, _pair(m.chunk_size)
    act = {None: lambda t: t, "silu": silu}[m.activation]

    def net(weights: list[Tensor], rows: Tensor) -> Tensor:
        y = rows @ weights[1]
        for w in weights[2:]:
            y = gelu(y) @ w
        return rows + (weights[0] + 1) * layer_norm(y, y.shape[-1:])

    def normed(rows: Tensor, name: str, h: int, asked: bool) -> Tensor:
        return rms_norm(rows, (dim,)) * (p[name][h] + 1) if asked else rows

    def of_head(name: str, rows: Tensor, h: int, each: int = 1) -> Tensor:
        return torch.sigmoid(linear(rows, p[name], p[f"{name}_bias"]))[..., h * each : (h + 1) * each]

    def head(sample: Tensor, seen: Tensor, h: int) -> Tensor:
        own = slice(h * dim, (h + 1) * dim)
        matrices = sum(name.startswith("init_model_weights") for name in p)
        now = [p["init_norm_gamma"][h], *(p[f"init_model_weights_{n}"][h] for n in range(matrices))]
        speeds = [[torch.zeros_like(w) for w in now] for _ in range(m.momentum_order)]
        base, history, stored = now, [now], rms_norm(sample, (6,)) * p["store_norm"]
        for c in range(len(sample) // size):
            here = slice(c * size, (c + 1) * size)
            k, v = (act(linear(stored[here], p[name][own])) for name in ("to_keys", "to_values"))
            k = normed(k, "k_norm", h, m.qk_rmsnorm)
            mean = stored[here].mean(0)
            theta = m.max_lr * of_head("to_adaptive_step", stored[here], h)[:, 0] * seen[here]
            at = [w.detach().requires_grad_() for w in base]
            push = torch.autograd.grad((theta * (net(at, k) - v).square().mean(-1)).sum(), at)
            if m.max_grad_norm:
                half = m.max_grad_norm / 2
                push = [g * (half * (torch.tanh(g.norm() / half) + 1) / g.norm()) if g.any() else g for g in push]
            if m.per_parameter_lr_modulation:
                rates = m.max_mem_layer_modulation * of_head("to_layer_modulation", mean, h, len(now))
                push = [r * g for r, g in zip(rates, push, strict=True)]
            push = [-g for g in push]
            if m.momentum:
                etas = of_head("to_momentum", mean, h, m.momentum_order)
                for order, eta in enumerate(etas):
                    push = [eta * s + g for s, g in zip(speeds[order], push, strict=True)]
                    speeds[order] = push
            now = [(1 - of_head("to_decay_factor", mean, h)) * w + s for w, s in zip(now, push, strict=True)]
            history.append(now)
            if m.batch_size and (c + 1) * size % m.batch_size == 0:
                base = now
        q = act(linear(rms_norm(sample, (6,)) * p["retrieve_norm"], p["to_queries"][own]))
        q = normed(q, "q_norm", h, m.qk_rmsnorm)
        r = torch.stack([net(history[(n + 1) // reads], q[n]) for n in range(len(sample))])
        return normed(r, "post_norm", h, m.post_rmsnorm)

    answers = []
    written = torch.ones(x.shape[:2]) if mask is None else mask
    for sample, seen in zip(x.double(), written.double(), strict=True):
        found = [head(sample, seen, h) for h in range(m.heads)]
        if m.heads > 1:
            gates = torch.sigmoid(linear(rms_norm(sample, (6,)) * p["retrieve_norm"], p["retrieve_gate"]))
            found = [linear(torch.cat([r * g[:, None] for r, g in zip(found, gates.T, strict=True)], -1),
                            p["combine_heads"])]  # fmt: skip
        answers.append(found[0])
    return torch.stack(answers).detach()


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)


def near(got: Tensor, expected: Tensor) -> bool:
    return bool((got - expected).abs().max() <= 1e-5 * expected.abs().max())


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(("size", "batch"), [(1, None), (3, None), (2, 4), (2, 2)])
def test_the_memory_is_its_definition(depth: int, size: int, batch: int | None) -> None:
    layer = made(chunk_size=size, batch_size=batch, memory_depth=depth, expansion_factor=2.0)
    x = hidden(11, width=6)
    assert near(layer(x), by_steps(layer, x))


@pytest.mark.parametrize(
    "knobs",
    [
        {"momentum_order": 2},
        {"momentum_order": 3, "heads": 2, "dim_head": 4, "qk_rmsnorm": True, "post_rmsnorm": True},
        {"momentum": False, "activation": "silu"},
        {"max_grad_norm": 0.3},
        {"max_grad_norm": 5.0, "batch_size": 4},
        {"per_parameter_lr_modulation": True, "max_mem_layer_modulation": 3.0, "heads": 2, "dim_head": 4},
        {"chunk_size": (4, 2)},
        {"chunk_size": (3, 2), "batch_size": 4, "momentum_order": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_its_options_are_their_definitions(knobs: dict[str, Any], masked: bool) -> None:
    layer = made(**({"chunk_size": 2, "expansion_factor": 2.0, "max_lr": 0.5} | knobs))
    x = hidden(11, width=6)
    mask = None
    if masked:  # of the second chunk nothing is written
        mask = torch.rand(2, 11, generator=torch.Generator().manual_seed(1)) < 0.6
        mask[:, 2:4] = False
    y = layer(x) if mask is None else layer(x, store_mask=mask)
    assert near(y, by_steps(layer, x, mask))
    y.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in layer.parameters() if p.grad is not None)


@pytest.mark.parametrize("pieces", [(11,), (4, 7), (1, 2, 3, 5), (1,) * 11])
@pytest.mark.parametrize("knobs", [{}, {"batch_size": 4}, {"batch_size": 2, "momentum_order": 2}, {"momentum": False}])
def test_a_memory_is_carried_from_piece_to_piece(knobs: dict[str, Any], pieces: tuple[int, ...]) -> None:
    layer = made(chunk_size=2, expansion_factor=2.0, max_lr=0.5, **knobs)
    x = hidden(11, width=6)
    decoder = Decoder(layer.mechanism, layer_site(6, 1, 1, causal=True, grid=None), params=layer.reattend.tensors)
    first, *rest = x.split(pieces, 1)
    got = torch.cat([decoder.prefill(first), *map(decoder.step, rest)], 1)
    assert near(got, layer(x))
    weights = 6 + 2 * 6 * 12
    held = {name: tuple(t.shape) for name, t in decoder.state.items()}
    assert held["weights"] == held["base"] == (2, 1, 1, weights)
    assert held["waiting"] == (2, 1, 6)  # 11 tokens in chunks of 2


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
    with pytest.raises(Refused, match="reads ahead"):
        module("titans", dim=6, causal=True, chunk_size=(2, 4))
    with pytest.raises(Refused, match="one memory"):
        Decoder(made(variant="mag").mechanism, layer_site(6, 1, 1, causal=True, grid=None)).prefill(hidden(3, width=6))
