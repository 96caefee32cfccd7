"""Generated Triton means what `scan` and `merge` mean: values and gradients, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import triton_interpreter  # noqa: F401 (kernels run in Python)
from kernel_calls import SCANS, B, D, Dv, H, N, drawn, said, same, whole, wide
from torch import Tensor

from reattend.codegen.triton import launch_scan, launch_scan_gradient
from reattend.codegen.triton import merge as merging
from reattend.compiler.primitives import scan as scan_front
from reattend.compiler.primitives.merge import MergeSpec, merge_meaning
from reattend.compiler.primitives.scan import scan
from reattend.compiler.primitives.scan_meaning import scan_meaning
from reattend.compiler.primitives.scan_spec import ScanSpec

MORE: dict[str, dict[str, Any]] = {
    "both ways": {"causal": False, "feature": torch.exp, "normaliser": "sum", "outputs": ("o", "state", "norm")},
    "both ways from a state": {"causal": False, "state": drawn(B, H, D, Dv), "valid": whole(0, 2, B, N)},
    "everything": {
        "log_decay": -drawn(B, 2, N).abs(),
        "feature": (torch.exp, torch.sigmoid),
        "normaliser": "sum",
        "eps": 1e-3,
        "reset": whole(0, 2, B, N).cumsum(-1) // 12,
        "valid": whole(0, 4, B, N),
        "state": drawn(B, H, D, Dv + 1).exp(),
        "outputs": ("o", "state", "norm"),
    },
    "everything read before": {
        "log_decay": -drawn(1, H, N).abs(),
        "valid": whole(0, 4, N),
        "state": drawn(B, H, D, Dv),
        "read": "before",
        "outputs": ("state", "o"),
    },
    "channels with documents": {
        "log_decay": -drawn(B, H, N, D).abs(),
        "reset": whole(0, 2, N).cumsum(-1) // 9,
        "valid": whole(0, 3, B, N),
        "state": drawn(B, H, D, Dv),
        "outputs": ("o", "state"),
    },
    "channels read before": {
        "log_decay": -drawn(B, H, N, D).abs(),
        "feature": torch.exp,
        "valid": whole(0, 4, N),
        "state": drawn(B, H, D, Dv),
        "read": "before",
        "outputs": ("state", "o"),
    },
    "factors that end a state": {"log_decay": torch.where(whole(0, 5, B, H, N) > 0, -0.1, -torch.inf)},
}
MORE["channels with everything"] = MORE["everything"] | {"log_decay": -drawn(B, 2, N, D).abs()}
CALLS = SCANS | MORE


def asked(monkeypatch: pytest.MonkeyPatch, q: Tensor, k: Tensor, v: Tensor, how: dict[str, Any]) -> tuple[Any, str]:
    groups, text = said(monkeypatch, scan_front, "scan_op", lambda: scan(q, k, v, **how))
    assert launch_scan.refuses(groups, text) is None
    return groups, text


LONG = "channels with everything"  # column by column in the interpreter: what it adds to the other calls with channels


def unless_long(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name == LONG else name for name in names]


@pytest.mark.parametrize("name", unless_long(CALLS))
def test_scan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = drawn(B, H, N, D), drawn(B, N, 2, D).transpose(1, 2), drawn(B, 2, N, Dv)
    groups, text = asked(monkeypatch, q, k, v, CALLS[name])
    same(launch_scan.run(groups, text), scan_meaning(wide(groups), text), 4e-6)


LEARNED = ("features", "read before", "everything", "everything read before", "both ways from a state",
           "channels with everything", "channels read before")  # fmt: skip


@pytest.mark.parametrize("name", unless_long(LEARNED))
def test_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of q, k, v, the state and logarithms of a decay, from random gradients of all outputs."""
    q, k, v = drawn(B, H, N, D), drawn(B, N, 2, D).transpose(1, 2), drawn(B, 2, N, Dv)
    groups, text = asked(monkeypatch, q, k, v, CALLS[name])
    agree(groups, text, 1e-5)


def agree(groups: Any, text: str, tolerance: float) -> None:
    exact = wide(groups)
    tensors = [t for group in exact for t in group]
    spec = ScanSpec.of(text)
    tables = {f"t{n - 3}": n for n in range(3, len(tensors))}
    left = tables[spec.decay] if spec.decay and not spec.log_decay else None  # factors: to the plain meaning
    wanted = [n for n, t in enumerate(tensors) if t.is_floating_point() and n != left]
    leaves = [tensors[n].requires_grad_() for n in wanted]
    outputs = scan_meaning(exact, text)
    results = launch_scan.run(groups, text)
    up = [drawn(*t.shape).to(r.dtype) for t, r in zip(outputs, results, strict=True)]
    found = launch_scan_gradient.gradients(groups, text, results, dict(enumerate(up)), wanted)
    assert found is not None
    total = sum((t * g.double()).sum() for t, g in zip(outputs, up, strict=True))
    same(list(found), list(torch.autograd.grad(total, leaves)), tolerance)  # type: ignore[arg-type]


@pytest.mark.parametrize("by", ["lse", "sum"])
def test_merge(by: str) -> None:
    parts = [(drawn(B, H, 9, Dv), drawn(B, H, 9) * 30) for _ in range(3)]
    if by == "lse":
        for n, (_, lse) in enumerate(parts):  # rows that some parts, and rows that no part has seen
            lse[:, :, : n + 1] = -torch.inf
    groups, text = [[o for o, _ in parts], [lse for _, lse in parts]], MergeSpec(by).text
    assert merging.refuses(groups, text) is None
    same(merging.run(groups, text), merge_meaning(wide(groups), text), 2e-6)
