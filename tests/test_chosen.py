"""`chosen`: every row by the matrices it chose, against a loop over rows; sorted rows against the plain meaning."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from reattend.codegen.chosen import NAME, run
from reattend.compiler.primitives.chosen import chosen, chosen_op
from reattend.compiler.primitives.operator import watched
from reattend.compiler.primitives.spec import Spec
from reattend.compiler.refusal import Refused


def one_by_one(x: Tensor, which: Tensor, w: Tensor) -> Tensor:
    """(R, K, A), of plain rows."""
    y = x.new_zeros(*which.shape, w.shape[2])
    for r in range(which.shape[0]):
        for s in range(which.shape[1]):
            if 0 <= which[r, s] < w.shape[0]:
                y[r, s] = x[r] @ w[which[r, s]]
    return y


def drawn(kind: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of which some chose the same matrix twice, some none, some one that is not there; two nobody chose."""
    which = torch.tensor([[0, 4], [4, 4], [-1, 2], [7, -1], [0, 2]])
    return torch.randn(5, 3, dtype=kind), which, torch.randn(6, 3, 4, dtype=kind)


def test_rows_sorted_by_choice_are_rows_one_by_one() -> None:
    x, which, w = drawn()
    with watched() as ran:
        got = chosen(x, which, w)
    assert [r.kernel for r in ran] == [NAME]
    torch.testing.assert_close(got, one_by_one(x, which, w))
    torch.testing.assert_close(chosen_op.eagerly(x, which, w, Spec().text)[0], one_by_one(x, which, w))


def test_gradients_are_those_of_the_meaning() -> None:
    x, which, w = drawn()
    dy = torch.randn(5, 2, 4, dtype=x.dtype)
    leaves = [t.clone().requires_grad_() for t in (x, w)]
    got = torch.autograd.grad(chosen(leaves[0], which, leaves[1]), leaves, dy)
    expected = torch.autograd.grad(one_by_one(leaves[0], which, leaves[1]), leaves, dy)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_nobody_chose_anything() -> None:
    x, _, w = drawn()
    x.requires_grad_()
    y = chosen(x, torch.full((5, 2), -1), w)
    assert y.eq(0).all()
    assert torch.autograd.grad(y.sum(), x)[0].eq(0).all()


def test_what_was_not_chosen_is_not_looked_at() -> None:
    x, which, w = drawn()
    w[[1, 3, 5]] = torch.nan
    torch.testing.assert_close(chosen(x, which, w), one_by_one(x, which, w))


@pytest.mark.parametrize("rows", [1, 2, 7, 15, 16, 40])
def test_who_else_chose_a_matrix_changes_no_bit(rows: int) -> None:
    x, w = torch.randn(60, 48), torch.randn(2, 48, 16)
    own = torch.arange(60)[:, None] >= rows  # these choose one matrix, all others the other
    assert torch.equal(chosen(x, own.long(), w)[:rows], chosen(x, torch.zeros(60, 1, dtype=torch.long), w)[:rows])


def test_work_grows_with_choices_and_not_with_matrices() -> None:
    x, w = torch.randn(1024, 8), torch.randn(16, 8, 4)
    which = torch.randint(0, 16, (1024, 2))
    with FlopCounterMode(display=False) as counted:
        run([[x], [which], [w]], Spec().text)  # the mode does not look into operators
    assert counted.get_total_flops() == 2 * 1024 * 2 * 8 * 4


X, W, NONE = torch.randn(5, 3), torch.randn(6, 3, 4), torch.zeros(5, 2, dtype=torch.long)
REFUSED: list[tuple[Callable[[], Tensor], str]] = [
    (lambda: chosen(X, NONE, W[:, :2]), "x (5, 3) of torch.float32, w (6, 2, 4)"),
    (lambda: chosen(X.double(), NONE, W), "of one floating type"),
    (lambda: chosen(X, NONE.float(), W), "choices of torch.float32: whole numbers"),
    (lambda: chosen(X, NONE[:4], W), "choices of shape (4, 2) for x (5, 3): (..., K), before K as x is before C"),
]


@pytest.mark.parametrize(("wrong", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_refused_with_what_would_fit(wrong: Callable[[], Tensor], says: str) -> None:
    with pytest.raises(Refused) as caught:
        wrong()
    assert says in str(caught.value)
