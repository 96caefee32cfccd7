"""Pooling as a token mixer, against torch's own pooling and against loops."""

from __future__ import annotations

import pytest
import torch

import reattend
from reattend.compiler.layers import module
from reattend.compiler.problem import hidden
from reattend.compiler.refusal import Refused


@pytest.mark.parametrize("size", [1, 3, 5, 13])
@pytest.mark.parametrize("shape", [(2, 6, 7, 5), (1, 3, 1, 1), (1, 2, 1, 9)])
def test_feature_maps(size: int, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    expected = torch.nn.functional.avg_pool2d(x, size, 1, size // 2, count_include_pad=False) - x
    pool = module("poolformer", pool_size=size)
    assert torch.allclose(pool(x), expected, atol=1e-5)
    tokens = pool(x.flatten(2).mT, grid=shape[2:])
    assert torch.allclose(tokens, expected.flatten(2).mT, atol=1e-5)


def test_prefix_tokens_are_bypassed() -> None:
    x = hidden(14)
    y = module("poolformer", grid=(3, 4, 2))(x)
    assert not y[:, :2].any()
    assert torch.allclose(y[:, 2:], module("poolformer", grid=(3, 4))(x[:, 2:]))


@pytest.mark.parametrize("causal", [False, True])
def test_sequences(causal: bool) -> None:
    x = hidden(9)
    y = module("poolformer", pool_size=5, causal=causal)(x)
    for n in range(9):
        window = slice(max(0, n - 4), n + 1) if causal else slice(max(0, n - 2), n + 3)
        assert torch.allclose(y[:, n], x[:, window].mean(1) - x[:, n], atol=1e-5)


def test_padding_is_no_token() -> None:
    x = hidden(8)
    real = torch.ones(2, 8, dtype=torch.bool)
    real[:, 6:] = False
    y = module("poolformer")(x, key_padding=real)
    assert torch.allclose(y[:, :6], module("poolformer")(x[:, :6]), atol=1e-6)


def test_it_is_linear_and_moves_with_the_picture() -> None:
    pool, x, z = module("poolformer"), torch.randn(1, 2, 8, 8), torch.randn(1, 2, 8, 8)
    assert torch.allclose(pool(2 * x - 3 * z), 2 * pool(x) - 3 * pool(z), atol=1e-5)
    moved = pool(x.roll(1, 3))[..., 2:-1]
    assert torch.allclose(moved, pool(x)[..., 1:-2], atol=1e-6)


@pytest.mark.parametrize("size", [0, 2, -1])
def test_even_sizes_are_refused(size: int) -> None:
    with pytest.raises(Refused, match="an odd number"):
        module("poolformer", pool_size=size)


def test_it_has_no_place_in_cross_attention() -> None:
    class Cross(torch.nn.Module):
        """Queries of one sequence, keys and values of another with padding."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.kv, self.out = torch.nn.Linear(8, 8), torch.nn.Linear(8, 16), torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, y: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
            q, (k, v) = self.q(x)[:, None], self.kv(y)[:, None].chunk(2, -1)
            s = (q @ k.mT).masked_fill(~real[:, None, None], -1e9)
            return self.out((s.softmax(-1) @ v).squeeze(1))

    given = torch.randn(2, 5, 8), torch.randn(2, 7, 8), torch.arange(7) < torch.tensor([[7], [4]])
    with pytest.raises(Refused, match="pools the tokens themselves, this is noncausal-cross"):
        reattend.optimize(Cross().eval(), "poolformer", given, measure=False)
