"""Weights divided by their own sum, and sums and factors written as einsums: one site, the model's numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_raising_unfamiliar import SIZES, Form, Unfamiliar, call, count
from torch import Tensor

from reattend.compiler.capture import capture
from reattend.compiler.masks import fold_masks
from reattend.compiler.primitives.attend_spec import AttendSpec
from reattend.compiler.raising import raise_sites

M = Unfamiliar


def renormalised_beside_a_number(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    i, j = count(q)
    w = (q @ k.mT).masked_fill(j > i, -1e9).softmax(-1)
    return (w / (w.sum(-1, keepdim=True) + 0.25)) @ v


def renormalised_at_least(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    w = (q @ k.mT).softmax(-1)
    return (w * (1 / torch.einsum("bhij->bhi", w).clamp(min=1e-9))[..., None]) @ v


def sum_of_an_einsum(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    e = torch.exp(q @ k.mT)
    return torch.einsum("bhij,bhjd->bhid", e * (1 / torch.einsum("bhij->bhi", e))[..., None], v)


def sum_of_an_einsum_turned(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    e = torch.exp(q @ k.mT)
    return torch.einsum("...ij,...jd,i...->...id", e, v, 1 / torch.einsum("bhij->ibh", e))


def scaled_in_an_einsum(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    e = torch.exp(q @ k.mT)
    return torch.einsum("bhij,bhi->bhij", e, e.sum(-1).reciprocal()) @ v


def renormalised_behind_a_mask(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """The epsilon stands beside a sum that may be as small: no number of its own beside what attends."""
    w = (q @ k.mT).softmax(-1) * torch.ones(q.shape[2], q.shape[2]).tril()
    return (w / (w.sum(-1, keepdim=True) + 1e-6)) @ v


def renormalised_by_a_neighbour(m: M, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    w = (q @ k.mT).softmax(-1)
    return (w / (w.sum(-2, keepdim=True) + 1e-6)) @ v


FORMS = [
    Form(renormalised_beside_a_number, "j <= i"), Form(renormalised_at_least), Form(sum_of_an_einsum),
    Form(sum_of_an_einsum_turned), Form(scaled_in_an_einsum),
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_one_site_with_nothing_behind_its_weights(form: Form) -> None:
    model = Unfamiliar(form).eval()
    with torch.no_grad():
        captured = capture(model, call(*SIZES[0]))
        raised = raise_sites(captured.graph)
        fold_masks(captured.graph)
        for size in SIZES:
            assert (captured.graph(*call(*size))[0] - model(*call(*size))).abs().max() <= 1e-5
    assert len(raised.nodes) == 1 and raised.misses == (), [str(m) for m in raised.misses]
    (node,) = (n for n in captured.graph.graph.nodes if n.target is torch.ops.reattend.attend.default)
    spec = AttendSpec.of(node.args[3])
    assert (spec.keep, spec.after) == (form.keep, "")


LEFT = [
    (renormalised_behind_a_mask, "something else than their sum"), (renormalised_by_a_neighbour, "also used by %sum"),
]  # fmt: skip


@pytest.mark.parametrize(("run", "reason"), LEFT, ids=lambda x: getattr(x, "__name__", ""))
def test_another_sum_is_left_alone(run: Callable[..., Tensor], reason: str) -> None:
    with torch.no_grad():
        raised = raise_sites(capture(Unfamiliar(Form(run)).eval(), call(2, 9)).graph)
    assert raised.nodes == () and [m for m in raised.misses if reason in m.reason], raised.misses
