"""InLine attention against its card: weights written out, a convolution with kernels of its own for every sample."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from linear_swaps import PIXELS, assert_swapped
from torch import Tensor

import reattend.passes  # noqa: F401 - fills the registry
from reattend.compiler.functional import attention
from reattend.compiler.problem import problem
from reattend.compiler.refusal import Refused

PHI = {
    "identity": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "leakyrelu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "exp": lambda x: torch.exp(0.2 * x),
}


def rows(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The weights of one row at a time."""
    o, keys = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype), k.shape[2]
    for i in range(q.shape[2]):
        s = [scale / keys * (q[:, :, i] * k[:, :, j]).sum(-1, keepdim=True) for j in range(keys)]
        mean = sum(s) / keys
        for j in range(keys):
            o[:, :, i] += (s[j] - mean + 1 / keys) * v[:, :, j]
    return o


@pytest.mark.parametrize("phi", list(PHI))
@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 7), (4, 9)])
def test_the_global_part(phi: str, n: int, m: int) -> None:
    q, k, v = problem(n, m, dtype=torch.float64)
    expected = rows(PHI[phi](q), PHI[phi](k), v, 8**-0.5)
    assert torch.allclose(attention(q, k, v, "inline", phi=phi, local_kernel=0), expected, atol=1e-10)
    single = attention(q.float(), k.float(), v.float(), "inline", phi=phi, local_kernel=0)
    assert torch.allclose(single, expected.float(), atol=1e-5)


def local(v: Tensor, mean: Tensor, p: dict[str, Tensor], h: int, w: int, prefix: int, size: int) -> Tensor:
    """Torch's own grouped layers and one depthwise convolution per sample, as the paper's code has them."""
    B, H, _, D = v.shape
    C = H * D
    t = torch.nn.functional.conv1d(mean[..., None], p["res_w1"][..., None], p["res_b1"], groups=H)
    t = t * 0.5 * (1 + torch.erf(t / math.sqrt(2)))
    r = torch.nn.functional.conv1d(t, p["res_w2"][..., None], p["res_b2"], groups=H).view(B, C, 1, size, size)
    image = v[:, :, prefix:].transpose(1, 2).reshape(B, h, w, C).permute(0, 3, 1, 2)
    found = [torch.nn.functional.conv2d(image[b : b + 1], r[b], padding=size // 2, groups=C)[0] for b in range(B)]
    new = torch.stack(found).flatten(2).unflatten(1, (H, D)).transpose(2, 3)
    return torch.cat((torch.zeros_like(v[:, :, :prefix]), new), 2)


@pytest.mark.parametrize(("h", "w", "prefix", "size"), [(3, 4, 0, 3), (4, 4, 1, 3), (5, 2, 2, 5)])
@pytest.mark.parametrize("port", ["x", "x_mean"])
def test_the_local_part(h: int, w: int, prefix: int, size: int, port: str) -> None:
    n = prefix + h * w
    q, k, v = problem(n, dtype=torch.float64)
    x = torch.randn(2, n, 32, dtype=torch.float64)
    shapes = {"res_w1": (32, 8), "res_b1": (32,), "res_w2": (32 * size**2, 8), "res_b2": (32 * size**2,)}
    p = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    given = {"x": x} if port == "x" else {"x_mean": x.mean(1)}
    got = attention(q, k, v, "inline", grid=(h, w, prefix), ports=given, params=p, local_kernel=size)
    expected = rows(q, k, v, 8**-0.5) + local(v, x.mean(1), p, h, w, prefix, size)
    assert torch.allclose(got, expected, atol=1e-10)
    named = attention(q, k, v, "inline", grid=(h, w), prefix_tokens=prefix, ports=given, params=p, local_kernel=size)
    assert torch.allclose(named, expected, atol=1e-10)


def test_other_queries_give_other_answers() -> None:
    q, k, v = problem(5)
    o, twice = (attention(c * q, k, v, "inline", local_kernel=0) for c in (1, 2))
    assert (o - twice).abs().max() > 0.1


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"causal": True}, "noncausal"),
        ({"grid": (2, 3)}, "asks for port x"),
        ({"ports": {"x": torch.zeros(2, 6, 32)}}, "needs the tokens' grid"),
        ({"ports": {"x": torch.zeros(2, 6, 32)}, "grid": (2, 2)}, "not a grid of 2 x 2"),
        ({"ports": {"x": torch.zeros(2, 6, 20)}, "grid": (2, 3)}, "20 channels"),
        ({"phi": "gelu"}, "identity, relu"),
    ],
)
def test_what_does_not_fit_is_refused(how: dict[str, Any], match: str) -> None:
    with pytest.raises(Refused, match=match):
        attention(*problem(6), "inline", **how)


def test_in_a_vit() -> None:
    assert_swapped(PIXELS, {"inline": {}}, {"res_w1", "res_b1", "res_w2", "res_b2"}, idle={"res_w1", "res_b1"})
