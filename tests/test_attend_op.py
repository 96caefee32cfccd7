"""attend as an operator: registered rightly, exported with open sizes, compiled whole, close in half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from reattend.compiler.primitives.attend import Relative, Segment, Tiles, attend, attend_op
from reattend.compiler.symbols import table

B, H, HKV, D, DV = 2, 4, 2, 6, 3


def rich(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, r: Tensor, slope: Tensor) -> tuple[Tensor, ...]:
    """Rows per query, a relative term, a second segment and every kind of output in one call."""
    t = table(slope)
    return attend(
        q, k, v, rows=rows, relative=[Relative(r, lambda i, j: i - j + 2)],
        score=lambda s, h, i, j: s - t[h] * abs(i - j),
        segments=(Segment(k, v, keep=lambda i, j: j < i),), sink=lambda h: t[h] * 2.0, after=lambda w: w * w,
        outputs=("o", "lse", "logits", "weights", "colsum", "colmean", "colmax", "entropy", "topk:3", "slab:2"),
    )  # fmt: skip


def tiled(q: Tensor, k: Tensor, v: Tensor, lists: Tensor, heads: Tensor) -> tuple[Tensor, ...]:
    """Tile lists, a table of key heads, and groups with a leader."""
    return attend(
        q, k, v, tiles=Tiles(lists, 4, 2), kv_heads=heads, causal=True, align="end", normaliser="grouped",
        leader=lambda j: j // 2 * 2, outputs=("o", "lse"),
    )  # fmt: skip


def _inputs(form: str, n: int, kind: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    q, k, v = (torch.randn(B, h, n, d, dtype=kind, requires_grad=True) for h, d in ((H, D), (HKV, D), (HKV, DV)))
    if form == "rich":
        table_r, slope = torch.randn(1, 5, D, dtype=kind, requires_grad=True), torch.rand(H, dtype=kind)
        return q, k, v, torch.randint(-1, n, (B, H, n, 3)), table_r, slope.requires_grad_()
    return q, k, v, torch.randint(-1, n, (1, H, -(-n // 4), 2)), torch.tensor([1, 0, 0, 1])


FORMS: dict[str, Callable[..., tuple[Tensor, ...]]] = {"rich": rich, "tiled": tiled}


def _learned(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    total = sum(torch.where(o.isfinite(), o, 0.0).square().sum() for o in outputs if o.requires_grad)
    return list(torch.autograd.grad(total, [t for t in inputs if t.requires_grad]))


@pytest.mark.parametrize("form", FORMS)
def test_registered_rightly(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("reattend.compiler.primitives.attend.attend_op", lambda *a: calls.append(a) or attend_op(*a))
    FORMS[form](*_inputs(form, 6))
    torch.library.opcheck(attend_op.op, calls[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_exported_with_open_sizes_and_compiled_whole(form: str) -> None:
    auto = torch.export.Dim.AUTO

    class Form(torch.nn.Module):
        def forward(self, *x: Tensor) -> tuple[Tensor, ...]:
            return FORMS[form](*x)

    rows = {0: auto, 2: auto}
    shapes = (rows, rows, rows, rows if form == "rich" else {2: auto}, *({},) * (2 if form == "rich" else 1))
    ep = torch.export.export(Form(), _inputs(form, 12), dynamic_shapes=(shapes,), strict=False)
    compiled = torch.compile(Form(), backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (12, 9):
        x = _inputs(form, n)
        expected = FORMS[form](*x)
        for found in (ep.module()(*x), compiled(*x)):
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b)
        for a, b in zip(_learned(compiled(*x), x), _learned(expected, x), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_halves_are_close(form: str, kind: torch.dtype) -> None:
    narrow = _inputs(form, 8, kind)
    wide = tuple(t.float() if t.is_floating_point() else t for t in narrow)
    for got, expected in zip(FORMS[form](*narrow), FORMS[form](*wide), strict=True):
        torch.testing.assert_close(got.to(expected.dtype), expected, atol=2e-2, rtol=2e-2)
