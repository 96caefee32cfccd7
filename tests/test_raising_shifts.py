"""Shifts in front of masks, scores met twice, masks made like an activation: one site, the model's numbers."""

from __future__ import annotations

import pytest
import torch
from test_raising_unfamiliar import SIZES, Form, Unfamiliar, call, count
from torch import Tensor

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


FORMS = [
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
    assert (spec.keep, spec.score) == (form.keep, "s"), verdicts


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
