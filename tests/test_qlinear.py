"""`qlinear`: its formats say what they should, its gradient passes to x, kernels equal the meaning."""

from __future__ import annotations

import pytest
import torch
from kernel_calls import must_build
from torch import Tensor

from reattend.codegen.cpu import qlinear_floats, qlinear_units
from reattend.compiler.doctor import cpu_flags
from reattend.compiler.primitives.operator import watched
from reattend.compiler.primitives.qlinear import qlinear, qlinear_meaning, qlinear_op, rounded_rows
from reattend.compiler.primitives.qlinear_spec import QLinearSpec, dequantized, packed, unpacked
from reattend.compiler.refusal import Refused

SPECS = [
    QLinearSpec("int8", 96),
    QLinearSpec("int8", 96, activations="int8", bias=True),
    QLinearSpec("int4", 96, group=32, bias=True),
    QLinearSpec("int4", 96, activations="int8"),
    QLinearSpec("qoq", 96, group=32, activations="int8"),
    QLinearSpec("qoq", 96, group=16, activations="int8", bias=True),
    QLinearSpec("int8", 7, activations="int8"),
    QLinearSpec("int8", 1),
    QLinearSpec("qoq", 70, group=10, activations="int8"),
    QLinearSpec("int4", 130, group=26),
]
LONG = [*SPECS[:5], *SPECS[6:8], QLinearSpec("int8", 1150), QLinearSpec("int4", 640, group=64),
        QLinearSpec("qoq", 576, group=64, activations="int8", bias=True)]  # fmt: skip
# what this processor can be asked: matrix units are stood in for by loops, dots are its own
ROADS = [
    *(["emulated"] if "avx512_bf16" in cpu_flags() else []),
    *(["dots"] if cpu_flags() >= qlinear_units.DOTS else []),
]


def stored(spec: QLinearSpec, outputs: int = 20, seed: int = 0) -> list[Tensor]:
    """Any codes, scales and zeros of a format."""
    draw = torch.Generator().manual_seed(seed)
    size = (outputs, spec.groups)
    scale = lambda shape, dtype: (torch.rand(shape, generator=draw) * 0.01 + 0.001).to(dtype)
    whole = lambda low, high, shape: torch.randint(low, high, shape, generator=draw)
    if spec.format == "int8":
        found = [whole(-127, 128, (outputs, spec.inputs)).to(torch.int8), scale((outputs,), torch.float32)]
    else:
        codes = packed(whole(0, 16, (outputs, spec.inputs)))
        if spec.format == "int4":
            found = [codes, scale(size, torch.float16), scale(size, torch.float16) * 8]
        else:
            found = [codes, scale((outputs,), torch.float16), whole(1, 9, size).to(torch.int8),
                     whole(0, 9, size).to(torch.int8)]  # fmt: skip
    return [*found, torch.randn(outputs, generator=draw)] if spec.bias else found


@pytest.mark.parametrize("count", [1, 63, 64, 65, 130])
def test_codes_lie_and_come_back(count: int) -> None:
    codes = torch.randint(0, 16, (3, count))
    assert torch.equal(unpacked(packed(codes), count), codes.to(torch.uint8))
    assert packed(codes).shape == (3, 32 * -(-count // 64))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.text)
def test_it_is_a_linear_layer_with_the_stored_weights(spec: QLinearSpec) -> None:
    tensors, x = stored(spec), torch.randn(2, 5, spec.inputs)
    got = qlinear(x, tensors, spec)
    if spec.activations:
        whole, scale = rounded_rows(x, tensors[1].dtype)
        assert torch.equal(whole, whole.round()) and whole.abs().max() <= 127
        x = whole * scale
    bias = tensors[-1].double() if spec.bias else None
    expected = torch.nn.functional.linear(x.double(), dequantized(tensors, spec), bias)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_whole_numbers_are_summed_exactly() -> None:
    """4096 products of 127 and 127 do not fit into float32's mantissa: the sum is that of whole numbers."""
    spec = QLinearSpec("int8", 4096, activations="int8")
    codes = torch.full((2, 4096), 127, dtype=torch.int8)
    codes[1, 0] = 126
    x = torch.full((1, 4096), 127.0, dtype=torch.float64)
    y = qlinear(x, [codes, torch.ones(2)], spec)
    assert y.tolist() == [[4096 * 127.0 * 127, 4096 * 127.0 * 127 - 127]]


@pytest.mark.parametrize("spec", SPECS[:6], ids=lambda spec: spec.text)
def test_the_gradient_passes_to_x_as_if_it_were_not_rounded(spec: QLinearSpec) -> None:
    tensors, x = stored(spec), torch.randn(4, spec.inputs, requires_grad=True)
    seen = torch.randn(4, 20)
    qlinear(x, tensors, spec).backward(seen)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, seen @ dequantized(tensors, spec).float(), rtol=1e-4, atol=1e-5)


def test_rows_of_zeros_and_rows_that_are_no_numbers() -> None:
    spec = QLinearSpec("int8", 8, activations="int8")
    tensors = stored(spec)
    x = torch.randn(3, 8)
    x[0], x[1, 2] = 0, torch.nan
    y = qlinear(x, tensors, spec)
    assert torch.equal(y[0], torch.zeros(20)) and y[1].isnan().all() and y[2].isfinite().all()


@pytest.mark.parametrize("rows", [(), (0,), (3, 0, 2)])
def test_any_number_of_rows(rows: tuple[int, ...]) -> None:
    spec = SPECS[1]
    assert qlinear(torch.randn(*rows, 96), stored(spec), spec).shape == (*rows, 20)


@pytest.mark.parametrize(
    ("spec", "width", "count", "said"),
    [
        (QLinearSpec("int5", 96), 96, 2, "format 'int5'"),
        (QLinearSpec("int4", 96, group=40), 96, 3, "groups of 40 of 96 inputs"),
        (QLinearSpec("int8", 96, activations="int4"), 96, 2, "activations 'int4'"),
        (QLinearSpec("int8", 96), 95, 2, r"x \(2, 95\)"),
        (QLinearSpec("int8", 96, bias=True), 96, 2, "2 tensors.*codes, scale, bias"),
    ],
)
def test_refusals(spec: QLinearSpec, width: int, count: int, said: str) -> None:
    with pytest.raises(Refused, match=said):
        qlinear(torch.randn(2, width), [torch.zeros(1)] * count, spec)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 17, 64])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.text)
def test_every_kernel_is_the_meaning(spec: QLinearSpec, rows: int, dtype: torch.dtype) -> None:
    tensors, x = stored(spec), torch.randn(rows, spec.inputs).to(dtype)
    (expected,) = qlinear_meaning([[x], tensors], spec.text)
    largest = expected.abs().max().item()
    for kernel in qlinear_op.kernels.get("cpu", []):
        if kernel.refuses([[x], tensors], spec.text) is None:
            (got,) = kernel.run([[x], tensors], spec.text)
            assert got.dtype == dtype and got.shape == expected.shape, kernel.name
            near = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype] * largest
            torch.testing.assert_close(got, expected, rtol=0, atol=near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [*SPECS[:5], SPECS[6], QLinearSpec("int8", 1152)], ids=lambda spec: spec.text)
def test_generated_kernels_are_the_meaning(
    spec: QLinearSpec, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors for few rows, matrix units or dots for any; loops stand in for the units' instructions."""
    must_build(monkeypatch, qlinear_units)
    must_build(monkeypatch, qlinear_floats)
    tensors, near = stored(spec, 36), {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    for rows in (1, 3, 37):
        x = torch.randn(rows, spec.inputs).to(dtype)
        (expected,) = qlinear_meaning([[x], tensors], spec.text)
        if rows < 5 and qlinear_floats.no_few([[x], tensors], spec.text) is None:
            (got,) = qlinear_floats.run_few([[x], tensors], spec.text)
            torch.testing.assert_close(got, expected, rtol=0, atol=near * expected.abs().max().item())
        for by in ROADS:
            if qlinear_units.no_tiles([[x], tensors], spec.text, by) is not None:
                continue
            (got,) = qlinear_units.run([[x], tensors], spec.text, by)
            torch.testing.assert_close(got, expected, rtol=0, atol=near * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", LONG, ids=lambda spec: spec.text)
def test_panels_are_the_meaning(spec: QLinearSpec, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """More inputs than a panel has, more rows than meet one, outputs that fill none; rows of nothing, of no numbers."""
    must_build(monkeypatch, qlinear_floats)
    tensors, near = stored(spec, 70), {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    for rows in (1, 3, 37, 250):
        x = torch.randn(rows, spec.inputs).to(dtype)
        if rows > 3:
            x[1], x[2] = 0, torch.nan
        assert qlinear_floats.no_panels([[x], tensors], spec.text) is None
        (expected,), (got,) = (
            qlinear_meaning([[x], tensors], spec.text),
            qlinear_floats.run_panels([[x], tensors], spec.text),
        )
        largest = float(expected.nan_to_num().abs().max())
        torch.testing.assert_close(got, expected, rtol=0, atol=near * largest, equal_nan=True)


@pytest.mark.skipif(not ROADS, reason="a processor without products of bytes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("spec", "rows"),
    [*((QLinearSpec("int8", 192), n) for n in (5, 8, 10, 23, 64)),
     *((QLinearSpec("int4", 192, group=64), n) for n in (5, 8, 10))],
    ids=str,
)  # fmt: skip
def test_taken_apart_rows_are_what_they_were(
    spec: QLinearSpec, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows meet codes as three whole numbers each: rows far from 1, of nothing, of no numbers, with outliers."""
    must_build(monkeypatch, qlinear_units)
    tensors, x = stored(spec, 36), torch.randn(rows, 192).to(dtype)
    x[0], x[1], x[2, 7], x[3], x[4, 0] = x[0] * 1e30, 0, 1000, x[3] * 1e-30, torch.nan
    expected = x.double() @ dequantized(tensors, spec).T
    for by in ROADS:
        assert qlinear_units.no_tiles([[x], tensors], spec.text, by) is None
        (got,) = qlinear_units.run([[x], tensors], spec.text, by)
        assert got[4].isnan().all()
        for row in (0, 1, 2, 3, *range(5, rows)):
            near = 1e-5 * float(expected[row].abs().max())
            rounded = {torch.float32: 0, torch.bfloat16: 2**-8}[dtype]
            torch.testing.assert_close(got[row].double(), expected[row], rtol=rounded, atol=near)


def test_a_call_runs_a_kernel() -> None:
    spec = QLinearSpec("int8", 512, activations="int8")
    with watched() as ran:
        qlinear(torch.randn(64, 512), stored(spec, 256), spec)
    assert ran[0].kernel
