"""Rotary positions in every spelling: what was turned, by what, in which pairs; or that it is not known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import reattend

WIDE = 8
RMS = {"version": 1, "sites": [{"match": "*", "attention": {"qk_norm": {"norm": "rmsnorm", "eps": 1e-6}}}]}
Turn = Callable[[Tensor, Tensor], Tensor]


def halves(t: Tensor, angles: Tensor) -> Tensor:
    cos, sin = (torch.cat((a, a), -1) for a in (angles.cos(), angles.sin()))
    first, second = t.chunk(2, -1)
    return t * cos + torch.cat((-second, first), -1) * sin


def neighbours(t: Tensor, angles: Tensor) -> Tensor:
    cos, sin = (a.repeat_interleave(2, -1) for a in (angles.cos(), angles.sin()))
    return t * cos + torch.stack((-t[..., 1::2], t[..., ::2]), -1).flatten(-2) * sin


def complexes(t: Tensor, angles: Tensor) -> Tensor:
    pairs = torch.view_as_complex(t.reshape(*t.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(3)


def apart(t: Tensor, angles: Tensor) -> Tensor:
    """Halves never joined before they are turned (gpt_oss)."""
    (first, second), cos, sin = t.chunk(2, -1), angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def sliced(turn: Turn) -> Turn:
    return lambda t, angles: torch.cat((turn(t[..., :4], angles[..., :2]), t[..., 4:]), -1)


def split(turn: Turn) -> Turn:
    def turned(t: Tensor, angles: Tensor) -> Tensor:
        head, tail = t.split((4, 4), -1)
        return torch.cat((turn(head, angles[..., :2]), tail), -1)

    return turned


def behind(t: Tensor, angles: Tensor) -> Tensor:
    """The last channels only (DeepSeek)."""
    return torch.cat((t[..., :4], halves(t[..., 4:], angles[..., :2])), -1)


class Turned(nn.Module):
    """Self-attention whose queries and keys are turned, normalised first or not."""

    def __init__(self, turn: Turn, *, norm: bool = False) -> None:
        super().__init__()
        self.qkv, self.out, self.turn, self.norm = nn.Linear(16, 48), nn.Linear(16, 16), turn, norm
        self.register_buffer("speeds", 1.0 / torch.arange(1, WIDE // 2 + 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, WIDE)).permute(2, 0, 3, 1, 4)
        if self.norm:
            q, k = (t * torch.rsqrt(t.square().mean(-1, keepdim=True) + 1e-6) for t in (q, k))
        angles = torch.arange(x.shape[1])[:, None] * self.speeds
        o = scaled_dot_product_attention(self.turn(q, angles), self.turn(k, angles), v, is_causal=True)
        y: Tensor = self.out(o.transpose(1, 2).flatten(2))
        return y


KNOWN = {
    "halves": halves, "neighbours": neighbours, "first halves": sliced(halves), "first neighbours": sliced(neighbours),
    "first split": split(halves),
}  # fmt: skip
UNKNOWN = {"behind": behind, "complex": complexes, "apart": apart}


@pytest.mark.parametrize("name", KNOWN)
def test_a_norm_comes_before_a_rotation_of_any_pairs(name: str) -> None:
    model, x = Turned(KNOWN[name]).eval(), torch.randn(2, 9, 16)
    fast = reattend.optimize(model, RMS, x, measure=False)
    assert "rope" in fast.report.rows[0].site.features
    expected = Turned(KNOWN[name], norm=True).eval()
    expected.load_state_dict(model.state_dict())
    for given in (x, torch.randn(3, 12, 16)):
        torch.testing.assert_close(fast(given), expected(given), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_rotation_that_is_not_known_is_one(name: str) -> None:
    model, x = Turned(UNKNOWN[name]).eval(), torch.randn(2, 9, 16)
    fast = reattend.optimize(model, "exact", x, measure=False)
    assert "rope" in fast.report.rows[0].site.features
    torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-5)
    for other in ("qk_norm", "complexformer"):
        with pytest.raises(reattend.Refused, match="what was rotated here is not known"):
            reattend.optimize(model, other, x, measure=False)


class Scaled(Turned):
    """Positions learned and added, channels scaled: nothing turns."""

    def __init__(self) -> None:
        super().__init__(lambda t, angles: t)
        self.places, self.sizes = nn.Parameter(torch.randn(1, 32, 16)), nn.Parameter(torch.randn(2, 1, WIDE))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.places[:, : x.shape[1]]
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, WIDE)).permute(2, 0, 3, 1, 4)
        o = scaled_dot_product_attention(q * self.sizes * 0.5, k, v, is_causal=True)
        y: Tensor = self.out(o.transpose(1, 2).flatten(2))
        return y


def test_scaled_channels_are_no_rotation() -> None:
    fast = reattend.optimize(Scaled().eval(), "exact", torch.randn(2, 9, 16), measure=False)
    assert "rope" not in fast.report.rows[0].site.features
