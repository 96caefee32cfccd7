"""Autocast on a CPU: dtypes and values as the original's, in fused encoder layers and where a forward turns it off."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import reattend


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()


@pytest.mark.parametrize("grad", [False, True], ids=["fused", "with gradients"])
def test_an_encoder_under_autocast_gives_what_its_fused_layers_give(grad: bool) -> None:
    model, x = encoder(), torch.randn(2, 9, 32)
    fast = reattend.optimize(model, "exact", (x,), measure=False)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        wanted, found = model(x), fast(x)
    assert found.dtype is wanted.dtype is (torch.float32 if grad else torch.bfloat16)
    apart = (found.float() - wanted.float()).abs().max() / wanted.float().abs().max()
    assert apart <= 2 * torch.finfo(torch.bfloat16).eps  # the last place, twice, of the largest value


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch itself, where it packs
@pytest.mark.parametrize("first", [False, True], ids=["without gradients first", "with gradients first"])
def test_an_encoder_packs_its_padding_where_no_gradients_are_asked_for(first: bool) -> None:
    model, x = encoder(), torch.randn(2, 9, 32)
    padding = torch.arange(9) >= torch.tensor([[9], [6]])
    for given in (None, ((x,), {"src_key_padding_mask": padding})):
        with torch.set_grad_enabled(first):
            fast = reattend.optimize(model, "exact", given, measure=False)
        for grad in (first, not first):
            with torch.set_grad_enabled(grad):
                wanted, found = model(x, src_key_padding_mask=padding), fast(x, src_key_padding_mask=padding)
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0.0)
            assert bool((wanted[1, 6:] == 0).all()) is not grad
        assert fast.report.captured.max_abs <= 1e-5 and not fast.report.warnings
    model.requires_grad_(False), fast.requires_grad_(False)
    torch.testing.assert_close(fast(x, src_key_padding_mask=padding), model(x, src_key_padding_mask=padding))


MASK = nn.Transformer.generate_square_subsequent_mask


@pytest.mark.parametrize("masked", ["encoder", "decoder"])
def test_a_mask_that_torch_would_look_at_is_taken_as_it_is(masked: str) -> None:
    torch.manual_seed(0)
    if masked == "encoder":
        model, given, name = encoder(), (torch.randn(2, 7, 32),), "mask"
    else:
        layer = nn.TransformerDecoderLayer(32, 4, 64, batch_first=True)
        model, name = nn.TransformerDecoder(layer, 1).eval(), "tgt_mask"
        given = torch.randn(2, 7, 32), torch.randn(2, 5, 32)
    fast = reattend.optimize(model, "exact", given, measure=False)
    for mask in (MASK(7), torch.randn(7, 7), MASK(7) == 0):  # causal, any other, one of booleans
        torch.testing.assert_close(fast(*given, **{name: mask}), model(*given, **{name: mask}), atol=1e-5, rtol=0.0)


class Apart(nn.Module):
    """One layer that is kept in float32, whatever stands around it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.exact = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        with torch.autocast("cpu", enabled=False):
            y: Tensor = self.exact(x.float())
        return y


def test_a_region_without_autocast_stays_without() -> None:
    torch.manual_seed(0)
    model, x = Apart().eval(), torch.randn(2, 9, 32)
    with torch.autocast("cpu", torch.bfloat16):
        fast = reattend.optimize(model, "exact", (x,), measure=False)
        wanted, found = model(x), fast(x)
    assert found.dtype is wanted.dtype is torch.float32
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0.0)
