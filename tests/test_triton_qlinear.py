"""Generated Triton means what `qlinear` means: every format against float64, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import triton_interpreter  # noqa: F401 (kernels run in Python)
from test_qlinear import stored

from reattend.codegen.triton import qlinear
from reattend.compiler.primitives.qlinear import qlinear_meaning, rounded_rows
from reattend.compiler.primitives.qlinear_spec import QLinearSpec

SPECS = [
    QLinearSpec("int8", 96),
    QLinearSpec("int8", 70, activations="int8", bias=True),
    QLinearSpec("int4", 96, group=32, bias=True),
    QLinearSpec("int4", 256, group=128),
    QLinearSpec("int4", 70, activations="int8"),
    QLinearSpec("qoq", 160, group=32, activations="int8"),
    QLinearSpec("qoq", 256, group=128, activations="int8", bias=True),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.text)
@pytest.mark.parametrize("rows", [(3,), (2, 21)], ids=str)
def test_qlinear(spec: QLinearSpec, rows: tuple[int, ...]) -> None:
    x, tensors = torch.randn(*rows, spec.inputs), stored(spec, 70)
    assert qlinear.refuses([[x], tensors], spec.text) is None
    (found,) = qlinear.run([[x], tensors], spec.text)
    (expected,) = qlinear_meaning([[x], tensors], spec.text)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_rows_are_rounded_as_the_meaning_rounds_them() -> None:
    """To the nearest, to the even one of two, with the scale in the type of the weights' scales; 0 stays 0."""
    x = torch.cat([torch.randn(5, 300), torch.zeros(1, 300), torch.arange(300.0)[None] / 2 - 23.5])
    for like in (torch.float32, torch.float16, torch.bfloat16):
        whole, scale = qlinear._rounded(x, like)
        expected, of_rows = rounded_rows(x, like)
        assert torch.equal(scale[:, None], of_rows) and torch.equal(whole.float(), expected)


def test_what_has_no_kernel_says_why() -> None:
    spec = QLinearSpec("qoq", 70, group=10, activations="int8")
    assert qlinear.refuses([[torch.randn(2, 70)], stored(spec)], spec.text) == "groups of 10, no multiple of 32"
    assert qlinear.refuses([[torch.randn(2, 96).double()], stored(SPECS[0])], SPECS[0].text) == "torch.float64"
