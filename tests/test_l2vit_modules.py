"""L2ViT's local concentration and positional convolution against torch's own layers, in train() and in eval()."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import reattend.passes  # noqa: F401 - fills the registry
from reattend.compiler.layers import module
from reattend.compiler.refusal import Refused


@pytest.mark.parametrize(("grid", "batch"), [((5, 7), 2), ((3, 3), 1), ((2, 9), 3)])
def test_lcm_is_its_chain_of_layers(grid: tuple[int, int], batch: int) -> None:
    layer = module("lcm", dim=6, grid=grid)
    first, last = (nn.Conv2d(6, 6, 7, padding=3, groups=6) for _ in range(2))
    norm, x = nn.BatchNorm2d(6), torch.randn(batch, grid[0] * grid[1], 6)
    chain = nn.Sequential(first, nn.GELU(), norm, last)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        named = {"conv1": first, "conv2": last, "bn": norm}
        for name, like in named.items():
            for part in ("weight", "bias"):
                layer.reattend.get_parameter(f"{name}_{part}").copy_(getattr(like, part))
    for train in (True, True, False):
        layer.train(train)
        chain.train(train)
        expected = chain(x.mT.unflatten(2, grid)).flatten(2).mT
        assert torch.allclose(layer(x), expected, atol=1e-5)
    assert torch.allclose(layer.reattend.bn_var, norm.running_var, atol=1e-6)
    assert torch.allclose(layer.reattend.bn_mean, norm.running_mean, atol=1e-6)


@pytest.mark.parametrize("act", [False, True])
def test_cpe_adds_a_convolution(act: bool) -> None:
    layer, conv = module("cpe", dim=6, act=act), nn.Conv2d(6, 6, 3, padding=1, groups=6)
    with torch.no_grad():
        layer.reattend.get_parameter("conv_weight").copy_(conv.weight)
        layer.reattend.get_parameter("conv_bias").copy_(conv.bias)
    image = torch.randn(2, 6, 4, 5)
    near = conv(image)
    assert torch.allclose(layer(image), image + (nn.functional.gelu(near) if act else near), atol=1e-6)


@pytest.mark.parametrize("slug", ["lcm", "cpe"])
def test_what_does_not_fit_is_refused(slug: str) -> None:
    with pytest.raises(Refused, match="needs the tokens' grid"):
        module(slug, dim=4)(torch.randn(1, 6, 4))
    with pytest.raises(Refused, match="no place for the 1 prefix"):
        module(slug, dim=4, grid=(2, 3, 1))(torch.randn(1, 7, 4))
    with pytest.raises(Refused, match="odd"):
        module(slug, dim=4, kernel=4)
