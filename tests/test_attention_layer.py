"""`reattend.Attention` as a layer to train from scratch: what it computes, that it learns, that it travels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.functional import scaled_dot_product_attention as sdpa

import reattend
from reattend import Attention, Refused
from reattend.compiler.problem import hidden
from reattend.compiler.rotary import rotated


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def by_hand(layer: Attention, x: Tensor, *, rope: float = 0.0, mask: Tensor | None = None) -> Tensor:
    q, k, v = (proj(x).unflatten(2, (-1, 8)).transpose(1, 2) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    if rope:
        q, k, *_ = rotated(q, k, base=rope)
    o = sdpa(q, k, v, mask, is_causal=layer.causal and mask is None, enable_gqa=True)
    return layer.o_proj(o.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("rope", [False, True, 500.0])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_it_is_its_projections_around_attention(kv_heads: int, rope: bool | float) -> None:
    layer, x = Attention("softmax", 32, heads=4, kv_heads=kv_heads, causal=True, rope=rope), hidden(9)
    close(layer(x), by_hand(layer, x, rope=10000.0 if rope is True else float(rope)))


def test_with_rope_only_the_distance_counts_and_positions_may_be_given() -> None:
    layer, x = Attention("softmax", 32, heads=4, rope=True), hidden(9)
    close(layer(x, positions=torch.arange(9) + 40), layer(x))
    own = torch.stack((torch.arange(9), torch.arange(9) * 2))
    close(layer(x, positions=own)[0], layer(x)[0])
    assert not torch.allclose(layer(x, positions=own)[1], layer(x)[1], atol=1e-3)


def test_keys_from_elsewhere_and_padding() -> None:
    layer, x, other = Attention("softmax", 32, heads=4, kv_heads=2, rope=True), hidden(5), hidden(7, seed=3)
    real = torch.arange(7) < torch.tensor([[7], [4]])
    changed = other.clone()
    changed[1, 4:] = 9.0
    close(layer(x, other, real), layer(x, changed, real))
    assert not torch.allclose(layer(x, other), layer(x, changed))


def test_dropout_acts_on_the_weights_in_training_alone() -> None:
    layer, x = Attention("softmax", 32, heads=4, causal=True, dropout=0.5), hidden(9)
    layer.eval()
    close(layer(x), by_hand(layer, x))
    layer.train()
    many = layer(x[:1].expand(4000, -1, -1))
    assert not torch.equal(many[0], many[1])
    # the mean of 4000 draws: the error of one is at most about 1
    assert float((many.mean(0) - by_hand(layer, x)[0]).abs().max().detach()) < 5 / 4000**0.5
    with pytest.raises(Refused, match="linear does not honour dropout"):
        Attention("linear", 32, heads=4, dropout=0.1)


@pytest.mark.parametrize("slug", ["softmax", "linear"])
def test_it_learns_to_repeat_what_came_before(slug: str) -> None:
    """The next token of a sequence of period 3, which no token tells by itself: the loss falls far below chance."""
    torch.manual_seed(0)
    layer = Attention(slug, 32, heads=4, kv_heads=2, causal=True, rope=True)
    model = nn.Sequential(nn.Embedding(8, 32), layer, nn.GELU(), nn.Linear(32, 8))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    losses = []
    for _ in range(25):
        ids = torch.randint(8, (16, 3)).repeat(1, 4)
        loss = cross_entropy(model(ids[:, :-1])[:, 2:].flatten(0, 1), ids[:, 3:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("slug", ["softmax", "moh", "agent"])
def test_its_state_dict_makes_the_same_layer(slug: str) -> None:
    extra: dict[str, Any] = {"grid": (3, 3)} if slug == "agent" else {"causal": True}
    layer, x = Attention(slug, 32, heads=4, **extra), hidden(9)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    again = Attention(slug, 32, heads=4, **extra)
    assert again.load_state_dict(layer.state_dict()) == ([], [])  # nothing missing, nothing unexpected
    assert torch.equal(again(x), layer(x))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch's, behind a graph break
@pytest.mark.parametrize("slug", ["window", "linear", "moh"])
def test_it_compiles_and_exports(slug: str) -> None:
    layer, x = Attention(slug, 32, heads=4, kv_heads=2, causal=True, rope=True), hidden(9)
    compiled = torch.compile(layer, backend="aot_eager")
    close(compiled(x), layer(x))
    compiled(x).square().mean().backward()
    assert all(p.grad is not None for p in layer.parameters())
    dynamic = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    exported = torch.export.export(layer, (x,), dynamic_shapes=dynamic, strict=False)
    close(exported.module()(hidden(13)), layer(hidden(13)))


def test_it_refuses_by_name() -> None:
    with pytest.raises(Refused, match="even size per head"):
        Attention("softmax", 12, heads=4, rope=True)
    with pytest.raises(Refused, match="rope with poolformer"):
        Attention("poolformer", 32, heads=4, rope=True)
    with pytest.raises(Refused, match="did you mean 'softmax'"):
        reattend.Attention("sofmax", 32, heads=4)
