"""Keys and values that a kernel reads as they are stored, codes with scales and zeros, mean what they come back as."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton_interpreter  # noqa: F401 (kernels run in Python)
from kernel_calls import drawn, said, same, whole, wide
from torch import Tensor

from reattend.codegen.triton import launch
from reattend.codegen.triton.blocks import Blocks
from reattend.compiler.primitives import attend as attend_front
from reattend.compiler.primitives.attend import Segment, attend, attend_op
from reattend.compiler.primitives.attend_stored import in_numbers
from reattend.compiler.primitives.packed_rows import RowSpec, packed_rows, unpacked_rows
from reattend.compiler.refusal import Refused

H, N, M = 4, 37, 90
ROWS: dict[str, tuple[RowSpec | None, RowSpec | None]] = {
    "8 bits": (RowSpec(8, 32), RowSpec(8, 32)),
    "4 bits": (RowSpec(4, 32), RowSpec(4, 32)),
    "4 bits of an odd head": (RowSpec(4, 27), RowSpec(4, 21)),
    "8 bits of an odd head": (RowSpec(8, 27), RowSpec(8, 21)),
    "groups of 8 bits": (RowSpec(8, 48, 12), RowSpec(8, 32, 16)),
    "groups of 4 bits": (RowSpec(4, 32, 16), RowSpec(4, 64, 8)),
    "keys alone": (RowSpec(4, 32), None),
    "values alone": (None, RowSpec(8, 40)),
}
HOW: dict[str, dict[str, Any]] = {
    "causal": {"causal": True, "align": "end"},
    "window": {"causal": True, "align": "end", "keep": lambda i, j: (i - j < 20) | (j < 4)},
    "sigmoid": {"weight": torch.sigmoid, "normaliser": "none"},
    "gathered": {"rows": whole(-1, M, 1, 2, 50)},
    "two segments": {},
}


def asked(monkeypatch: pytest.MonkeyPatch, rows: str, how: str, tokens: int = N) -> tuple[Any, str]:
    of_k, of_v = ROWS[rows]
    k, v = (drawn(1, 2, M, r.dim if r else d) for r, d in ((of_k, 32), (of_v, 32)))
    q, given = drawn(1, H, tokens, k.shape[-1]), dict(HOW[how])
    if how == "two segments":
        given["segments"] = [Segment(drawn(1, 2, 9, k.shape[-1]), drawn(1, 2, 9, v.shape[-1]))]
    held = [packed_rows(t, r) if r else t for t, r in ((k, of_k), (v, of_v))]
    call = lambda: attend(q, held[0], held[1], stored=(of_k, of_v), **given)
    return said(monkeypatch, attend_front, "attend_op", call)


def expected(groups: Any, text: str) -> list[Tensor]:
    groups, text = in_numbers(groups, text)
    return attend_op.meaning(wide(groups), text)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("rows", ROWS)
def test_what_is_stored_is_read_as_its_numbers(rows: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, text = asked(monkeypatch, rows, how)
    assert launch.refuses(groups, text) is None
    same(launch.run(groups, text), expected(groups, text), 5e-6)


@pytest.mark.parametrize("rows", ROWS)
def test_programs_share_what_is_stored(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, text = asked(monkeypatch, rows, "window", tokens=1)
    same(launch.run(groups, text, blocks=Blocks(16, 32, 4, 1), shares=3), expected(groups, text), 5e-6)


def test_a_kernel_that_reads_numbers_gets_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU: no kernel there reads bytes, and the call is as exact as on the numbers."""
    spec = RowSpec(8, 32)
    q, k, v = drawn(1, H, N, 32), drawn(1, 2, M, 32), drawn(1, 2, M, 32)
    held = [packed_rows(t, spec) for t in (k, v)]
    back = [unpacked_rows(t, spec) for t in held]
    learned = q.clone().requires_grad_()
    found = attend(learned, *held, stored=(spec, spec), causal=True, align="end")
    plain = q.clone().requires_grad_()
    other = attend(plain, *back, causal=True, align="end")
    torch.testing.assert_close(found, other, atol=1e-6, rtol=0)
    for o in (found, other):
        o.sum().backward()
    torch.testing.assert_close(learned.grad, plain.grad, atol=1e-5, rtol=0)


def test_bytes_that_are_no_such_rows_are_refused() -> None:
    spec = RowSpec(8, 32)
    rows = packed_rows(drawn(1, 2, M, 32), spec)
    with pytest.raises(Refused, match=r"35 of torch.uint8: rows of 36 bytes"):
        attend(drawn(1, H, N, 32), rows[..., :35], rows, stored=(spec, spec))
    with pytest.raises(Refused, match="rows of torch.uint8"):
        attend(drawn(1, H, N, 36), rows, rows)


def test_bytes_that_lie_apart_are_refused_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    groups, text = asked(monkeypatch, "8 bits", "causal")
    (q,), (k, v), tables = groups
    apart = k.mT.contiguous().mT
    assert launch.refuses([[q], [apart, v], tables], text) == "rows whose bytes do not lie together"
