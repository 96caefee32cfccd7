"""DaViT's two attentions against loops: windows masked or filled, channels in both roles, both scales, other groups."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models.davit import ChannelAttention, ChannelAttentionV2
from torch import Tensor

import reattend
from reattend.compiler.functional import attention
from reattend.compiler.problem import problem
from reattend.compiler.refusal import Refused


def windows(q: Tensor, k: Tensor, v: Tensor, h: int, w: int, size: tuple[int, int], pad: Any, shift: Any) -> Tensor:
    """One query at a time; places that the grid does not fill hold pad's key and value, if there is one."""
    q, k, v = (t.double() for t in (q, k, v))
    o = torch.zeros_like(q)
    places = [((i // w - shift[0]) % h, (i % w - shift[1]) % w) for i in range(h * w)]
    for i, (y, x) in enumerate(places):
        mine = [j for j, (b, a) in enumerate(places) if b // size[0] == y // size[0] and a // size[1] == x // size[1]]
        keys, values = k[:, :, mine], v[:, :, mine]
        beyond = size[0] * size[1] - len(mine)
        if pad is not None and beyond:
            keys, values = (torch.cat((t, p.double()[None, :, None].expand(2, -1, beyond, -1)), 2)
                            for t, p in zip((keys, values), pad, strict=True))  # fmt: skip
        o[:, :, i] = (
            ((keys @ q[:, :, i, :, None])[..., 0] * q.shape[3] ** -0.5).softmax(-1)[:, :, None].matmul(values)[:, :, 0]
        )
    return o


@pytest.mark.parametrize(("h", "w", "size"), [(4, 6, (2, 3)), (5, 7, (3, 3)), (3, 4, (7, 7)), (5, 4, (2, 4))])
@pytest.mark.parametrize("shift", [(0, 0), (1, 2)])
@pytest.mark.parametrize("fill", [None, "zeros", "biases"])
def test_windows(h: int, w: int, size: tuple[int, int], shift: Any, fill: str | None) -> None:
    q, k, v = problem(h * w)
    pad = {None: None, "zeros": (torch.zeros(4, 8),) * 2, "biases": (torch.randn(4, 8), torch.randn(4, 8))}[fill]
    params = {"pad_k": pad[0], "pad_v": pad[1]} if pad is not None and fill == "biases" else {}
    got = attention(q, k, v, "davit", grid=(h, w), kind="window", window=size, shift=shift, params=params,
                    pad_mode="mask" if fill is None else "fill")  # fmt: skip
    assert torch.allclose(got.double(), windows(q, k, v, h, w, size, pad, shift), atol=1e-5)


@pytest.mark.parametrize("roles", ["qkv", "kvq"])
@pytest.mark.parametrize("scale_by", ["dim", "tokens"])
@pytest.mark.parametrize("groups", [None, 2, 16])
def test_channels(roles: str, scale_by: str, groups: int | None) -> None:
    q, k, v = problem(11)
    got = attention(q, k, v, "davit", kind="channel", roles=roles, scale_by=scale_by, groups=groups)
    wide = [t.double().permute(0, 2, 1, 3).reshape(2, 11, 32) for t in (q, k, v)]
    a, b, c = (wide[1], wide[2], wide[0]) if roles == "kvq" else wide
    width = 32 // (groups or 4)
    scale = 11**-0.5 if scale_by == "tokens" else width**-0.5
    expected = torch.zeros(2, 11, 32, dtype=torch.float64)
    for first in range(0, 32, width):
        for i in range(first, first + width):
            logits = [scale * (a[:, :, i] * b[:, :, j]).sum(1) for j in range(first, first + width)]
            weights = torch.stack(logits, -1).softmax(-1)
            expected[:, :, i] = (weights[:, None] * c[:, :, first : first + width]).sum(-1)
    assert torch.allclose(got.double(), expected.reshape(2, 11, 4, 8).transpose(1, 2), atol=1e-5)


def test_a_trained_layer_s_channels() -> None:
    """timm's two versions: the first scales by the width and calls its roles k, v, q; the second by the tokens."""
    torch.manual_seed(0)
    x = torch.randn(2, 9, 16)
    for layer, knobs in (
        (ChannelAttention(16, 2), {"roles": "kvq"}),
        (ChannelAttentionV2(16, 2), {"scale_by": "tokens"}),
    ):
        q, k, v = layer.qkv(x).reshape(2, 9, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        o = attention(q, k, v, "davit", kind="channel", **knobs)
        if isinstance(layer, ChannelAttention):
            assert torch.allclose(layer.proj(o.transpose(1, 2).reshape(2, 9, 16)), layer(x), atol=1e-5)
        else:
            roles = [attention(q, k, v, "davit", kind="channel", roles=r, **knobs) for r in ("qkv", "kvq")]
            outs = [layer.proj(one.transpose(1, 2).reshape(2, 9, 16)) for one in roles]
            assert any(torch.allclose(out, layer(x), atol=1e-5) for out in outs)


def test_padding_tokens_count_as_zeros() -> None:
    q, k, v = problem(8)
    real = torch.arange(8).expand(2, 8) < 5
    for knobs in ({}, {"scale_by": "tokens"}, {"roles": "kvq"}):
        got = attention(q, k, v, "davit", kind="channel", mask=real, **knobs)
        short = attention(q[:, :, :5], k[:, :, :5], v[:, :, :5], "davit", kind="channel", **knobs)
        assert torch.allclose(got[:, :, :5], short, atol=1e-5)


def test_refusals() -> None:
    q, k, v = problem(12)
    with pytest.raises(Refused, match="do not tile this grid"):
        attention(q, k, v, "davit", grid=(3, 4), window=2, pad_mode="none")
    with pytest.raises(Refused, match="channels attend over all tokens at once"):
        attention(q, k, v, "davit", kind="channel", causal=True)
    with pytest.raises(Refused, match="groups=5"):
        attention(q, k, v, "davit", kind="channel", groups=5)


@pytest.mark.parametrize("knobs", [{"over": "window", "window": 2}, {"over": "channel", "scale_by": "tokens"}])
def test_in_a_vision_model(knobs: dict[str, Any]) -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    x = torch.randn(2, 3, 32, 32)
    recipe = {"version": 1, "sites": [{"match": "*", "attention": {"davit": knobs}}]}
    fast = reattend.optimize(model, recipe, x, measure=False)
    fast(x).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in fast.parameters())
