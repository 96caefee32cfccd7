"""Shifts in front of masks, scores met twice, masks made like an activation: one site, the model's numbers."""

from __future__ import annotations

import pytest
import torch
from test_raising_unfamiliar import SIZES, Form, Unfamiliar, call, count
from torch import Tensor

import reattend
from reattend.compiler.capture import capture
from reattend.compiler.masks import fold_masks
from reattend.compiler.primitives.attend_spec import AttendSpec
from reattend.compiler.raising import raise_sites

M = Unfamiliar


def shifted_before_the_mask(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    i, j = count(q)
    s = q @ k.mT
    return (s - s.amax(-1, keepdim=True).detach()).masked_fill(j > i, -torch.inf).softmax(-1) @ v


def shifted_by_the_largest_of_all(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """GLIP's and Grounding DINO's: clamped where exp is nothing."""
    i, j = count(q)
    s = q @ k.mT
    s = (s - s.max()).clamp(min=-50000).clamp(max=50000)
    return (s + torch.where(j > i, -1e9, 0.0)).softmax(-1) @ v


def made_like_queries(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    n = q.shape[2]
    return (q @ k.mT).masked_fill(torch.tril(q.new_ones(n, n)).eq(0), -torch.inf).softmax(-1) @ v


def counted_by_a_running_sum(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    place = torch.ones(q.shape[2]).cumsum(0)
    return (q @ k.mT).masked_fill(place[:, None] < place, -torch.inf).softmax(-1) @ v


def decoder_with_padding(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """BERT's as a decoder: products of whole numbers, cast to float32, from 1."""
    i, j = count(q)
    kept = (j <= i).long()[None, None] * (ids > 0).long()[:, None, None]
    return (q @ k.mT + (1.0 - kept.float()) * torch.finfo(torch.float32).min).softmax(-1) @ v


def scaled_shifted_masked(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    i, j = count(q)
    s = (q * 2) @ k.mT * 0.5
    return (s - torch.max(s, dim=-1, keepdim=True)[0]).masked_fill(j > i, -1e9).softmax(-1) @ v


def put_behind_whole_dimensions(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    i, j = count(q)
    s = q @ k.mT
    s[:, :, j > i] = -torch.inf
    return s.softmax(-1) @ v


FORMS = [
    Form(put_behind_whole_dimensions, "j <= i"),
    Form(decoder_with_padding, "(0 < t0[b, j]) & (j <= i)"), Form(scaled_shifted_masked, "j <= i"),
    Form(shifted_before_the_mask, "j <= i"), Form(shifted_by_the_largest_of_all, "j <= i"),
    Form(made_like_queries, "j <= i"), Form(counted_by_a_running_sum, "j <= i"),
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_one_site_and_its_predicate(form: Form) -> None:
    model = Unfamiliar(form).eval()
    with torch.no_grad():
        captured = capture(model, call(*SIZES[0]))
        raised = raise_sites(captured.graph)
        verdicts = fold_masks(captured.graph)
        for size in SIZES:
            assert (captured.graph(*call(*size))[0] - model(*call(*size))).abs().max() <= 1e-5
    assert len(raised.nodes) == 1 and raised.misses == (), [str(m) for m in raised.misses]
    (node,) = (n for n in captured.graph.graph.nodes if n.target is torch.ops.reattend.attend.default)
    spec = AttendSpec.of(node.args[3])
    assert spec.keep == form.keep and spec.score in ("s", "s * 2.0 * 0.5", "s * 1.0"), (spec.score, verdicts)


def both_ways(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    s = q @ k.mT
    return (s + s.mT).softmax(-1) @ v


def shifted_inside_a_bend(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    s = q @ k.mT
    return torch.tanh(s - s.amax(-1, keepdim=True)).softmax(-1) @ v


def shifted_by_its_column(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    i, j = count(q)
    s = q @ k.mT
    return (s - s.amax(-2, keepdim=True)).masked_fill(j > i, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("run", [both_ways, shifted_inside_a_bend, shifted_by_its_column], ids=lambda r: r.__name__)
def test_what_changes_the_weights_keeps_its_numbers(run: object) -> None:
    model = Unfamiliar(Form(run)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        captured = capture(model, call(2, 9))
        raise_sites(captured.graph)
        assert (captured.graph(*call(2, 9))[0] - model(*call(2, 9))).abs().max() <= 1e-5


def rotated_in_float32(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    q, k = q.float() * m.temperature.float(), k.float()
    return (q @ k.mT).softmax(-1).to(v.dtype) @ v


def values_in_float32(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return ((q @ k.mT).float().softmax(-1) @ (v.float() * 2)).to(q.dtype)


@pytest.mark.parametrize("run", [rotated_in_float32, values_in_float32], ids=lambda r: r.__name__)
def test_operands_of_two_dtypes_attend_in_the_wider(run: object) -> None:
    torch.manual_seed(0)
    model, (x, ids) = Unfamiliar(Form(run)).eval().bfloat16(), call(2, 9)  # type: ignore[arg-type]
    fast = reattend.optimize(model, "exact", (x.bfloat16(), ids), measure=False)
    found, wanted = fast(x.bfloat16(), ids), model(x.bfloat16(), ids)
    assert found.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-2)  # two last places of bfloat16 at 1
