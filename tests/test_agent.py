"""Agent attention against its formulas written out: grids, prefix tokens, reduced keys, sequences, merged agents."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import reattend.passes  # noqa: F401 - fills the registry
from reattend.compiler.functional import attention
from reattend.compiler.mechanism import mechanism
from reattend.compiler.place import stand
from reattend.compiler.problem import problem
from reattend.compiler.refusal import Refused


def learned(q: Tensor, k: Tensor, v: Tensor, grid: Any, **knobs: Any) -> dict[str, Tensor]:
    """Random tensors for everything that an agent site declares."""
    site = stand(q, k, v, grid=grid).site
    draw = torch.Generator().manual_seed(7)
    return {n: torch.randn(d.shape, generator=draw) for n, d in mechanism("agent", **knobs).params(site).items()}


def bins(size: int, count: int) -> list[slice]:
    return [slice(i * size // count, math.ceil((i + 1) * size / count)) for i in range(count)]


def written_out(
    q: Tensor, k: Tensor, v: Tensor, p: dict[str, Tensor], side: int, h: int, w: int, kh: int, kw: int, prefix: int
) -> Tensor:
    """The card's six steps, loops where torch has a function."""
    B, H, N, D = q.shape
    scale = D**-0.5
    image = q[:, :, prefix:].reshape(B, H, h, w, D)
    a = torch.stack([image[:, :, r, c].mean((2, 3)) for r in bins(h, side) for c in bins(w, side)], 2)
    size = {"mode": "bilinear", "align_corners": False}
    b1 = torch.nn.functional.interpolate(p["an_bias"], (kh, kw), **size) + p["ah_bias"][0] + p["aw_bias"][0]
    b1 = b1.reshape(H, side * side, kh * kw)
    b2 = torch.nn.functional.interpolate(p["na_bias"], (h, w), **size).permute(0, 2, 3, 1)
    b2 = (b2 + p["ha_bias"][0] + p["wa_bias"][0]).reshape(H, h * w, side * side)
    if prefix:
        b1, b2 = torch.cat((p["ac_bias"][0], b1), -1), torch.cat((p["ca_bias"][0], b2), -2)
    va = torch.softmax(scale * a @ k.mT + b1, -1) @ v
    o = torch.softmax(scale * q @ a.mT + b2, -1) @ va
    pixels = v[:, :, prefix:].transpose(2, 3).reshape(B, H * D, kh, kw)
    if (kh, kw) != (h, w):
        pixels = torch.nn.functional.interpolate(pixels, (h, w), **size)
    conv = torch.nn.functional.conv2d(pixels, p["dwc_weight"], p["dwc_bias"], padding=1, groups=H * D)
    rows = conv.reshape(B, H, D, h * w).transpose(2, 3)
    return torch.cat((o[:, :, :prefix], o[:, :, prefix:] + rows), 2)


@pytest.mark.parametrize(("h", "w", "prefix", "agents"), [(3, 4, 0, 4), (7, 7, 1, 9), (5, 8, 1, 16), (4, 4, 3, 49)])
def test_on_a_grid(h: int, w: int, prefix: int, agents: int) -> None:
    q, k, v = problem(prefix + h * w)
    grid = (h, w, prefix)
    params = learned(q, k, v, grid, agent_num=agents)
    got = attention(q, k, v, "agent", agent_num=agents, grid=grid, params=params)
    assert torch.allclose(got, written_out(q, k, v, params, math.isqrt(agents), h, w, h, w, prefix), atol=1e-5)


def test_spatially_reduced_keys() -> None:
    q, k, v = problem(24, 6)
    knobs = {"agent_num": 4, "kv_grid": (2, 3)}
    params = learned(q, k, v, (4, 6), **knobs)
    got = attention(q, k, v, "agent", grid=(4, 6), params=params, **knobs)
    assert torch.allclose(got, written_out(q, k, v, params, 2, 4, 6, 2, 3, 0), atol=1e-5)
    with pytest.raises(Refused, match="give kv_grid"):
        attention(q, k, v, "agent", agent_num=4, grid=(4, 6))


def test_on_a_sequence() -> None:
    q, k, v = problem(11, kv_heads=2)
    params = learned(q, k, v, None, agent_num=3)
    got = attention(q, k, v, "agent", agent_num=3, params=params)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    a = torch.stack([q[:, :, r].mean(2) for r in bins(11, 3)], 2)
    b1 = torch.nn.functional.interpolate(params["an_bias"], 11, mode="linear")
    b2 = torch.nn.functional.interpolate(params["na_bias"], 11, mode="linear").mT
    o = torch.softmax(q @ a.mT * 8**-0.5 + b2, -1) @ torch.softmax(a @ k.mT * 8**-0.5 + b1, -1) @ v
    row = v.transpose(2, 3).reshape(2, 32, 11)
    conv = torch.nn.functional.conv1d(row, params["dwc_weight"], params["dwc_bias"], padding=1, groups=32)
    assert torch.allclose(got, o + conv.reshape(2, 4, 8, 11).mT, atol=1e-5)


def test_bias_at_its_own_size_is_not_resized() -> None:
    q, k, v = problem(49)
    params = {name: torch.zeros_like(t) for name, t in learned(q, k, v, (7, 7), agent_num=4).items()}
    params["an_bias"] = torch.randn(4, 4, 7, 7)
    got = attention(q, k, v, "agent", agent_num=4, grid=(7, 7), params=params)
    a = torch.nn.functional.adaptive_avg_pool2d(q.mT.reshape(2, 32, 7, 7), 2).reshape(2, 4, 8, 4).mT
    va = torch.softmax(a @ k.mT * 8**-0.5 + params["an_bias"].reshape(4, 4, 49), -1) @ v
    assert torch.allclose(got, torch.softmax(q @ a.mT * 8**-0.5, -1) @ va, atol=1e-5)


def test_agents_of_a_grid_are_a_square() -> None:
    q, k, v = problem(12)
    with pytest.raises(Refused, match="agent_num=5 is no square"):
        attention(q, k, v, "agent", agent_num=5, grid=(3, 4))
    assert attention(q, k, v, "agent", agent_num=5).shape == q.shape


# --- agent_sd ---------------------------------------------------------------------------------------------------------


def merged(q: Tensor, metric: Tensor, h: int, w: int, sx: int, sy: int, ratio: float) -> Tensor:
    """One sample at a time, one token at a time: q (B, H, N, D) to its agents."""
    targets = [r * w + c for r in range(0, h // sy * sy, sy) for c in range(0, w // sx * sx, sx)]
    sources = [t for t in range(h * w) if t not in targets]
    count = min(len(sources), int(h * w * ratio))
    answers = []
    for sample in range(q.shape[0]):
        unit = metric[sample] / metric[sample].norm(dim=-1, keepdim=True)
        best = {s: max((float(unit[s] @ unit[t]), t) for t in targets) for s in sources}
        order = sorted(sources, key=lambda s: -best[s][0])
        groups = {t: [t] + [s for s in order[:count] if best[s][1] == t] for t in targets}
        rows = [q[sample, :, s] for s in order[count:]] + [q[sample, :, groups[t]].mean(1) for t in targets]
        answers.append(torch.stack(rows, 1))
    return torch.stack(answers)


@pytest.mark.parametrize(("h", "w", "cell", "ratio"), [(8, 8, 2, 0.6), (8, 8, 4, 0.95), (5, 7, 2, 0.55)])
@pytest.mark.parametrize("with_x", [False, True])
def test_agents_are_merged_queries(h: int, w: int, cell: int, ratio: float, with_x: bool) -> None:
    q, k, v = problem(h * w)
    x = torch.randn(2, h * w, 20)
    metric = x if with_x else q.transpose(1, 2).flatten(2)
    a = merged(q, metric, h, w, cell, cell, ratio)
    assert 2 * a.shape[2] < h * w
    knobs = {"sx": cell, "sy": cell, "agent_ratio": ratio}
    got = attention(q, k, v, "agent_sd", grid=(h, w), ports={"x": x} if with_x else {}, **knobs)
    scale = 8**-0.5
    expected = torch.softmax(q @ a.mT * scale**0.3, -1) @ torch.softmax(a @ k.mT * scale, -1) @ v + 0.075 * v
    assert torch.allclose(got, expected, atol=1e-5)
    assert torch.allclose(attention(q, k, v, "agent_sd", ports={"agents": a}), expected, atol=1e-5)


def test_without_shortcut_and_sharpening_it_is_agent_attention() -> None:
    q, k, v = problem(36)
    a = torch.nn.functional.adaptive_avg_pool2d(q.mT.reshape(2, 32, 6, 6), 3).reshape(2, 4, 8, 9).mT
    plain = attention(q, k, v, "agent", agent_num=9, grid=(6, 6))  # biases and convolution start at 0
    assert torch.allclose(
        attention(q, k, v, "agent_sd", k_scale2=1.0, k_shortcut=0.0, ports={"agents": a}), plain, atol=1e-5
    )


def test_cross_attention_and_many_agents_stay_softmax() -> None:
    q, k, v = problem(16, 5)
    softmax = attention(q, k, v, "softmax")
    assert torch.equal(attention(q, k, v, "agent_sd", grid=(4, 4)), softmax)
    q, k, v = problem(16)
    assert torch.equal(
        attention(q, k, v, "agent_sd", ports={"agents": q[:, :, :8]}), attention(q, k, v, "softmax")
    )  # 2 A < N does not hold
