"""Calls of the primitives that every kernel is asked about: each feature of a spec once, at odd sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reattend.codegen.cpu.toolchain import NO_COMPILER, toolchain
from reattend.compiler.primitives.attend import Relative, Segment, Tiles
from reattend.compiler.symbols import as_expr, build, table

B, H, N, M, D, Dv = 2, 4, 97, 130, 24, 40
torch.manual_seed(0)  # what is drawn here is the same in every run; every test starts from its own seed


def must_build(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    """A kernel of the module that cannot be built is an error: what would run in its place gives right numbers too."""
    if toolchain() is None:
        pytest.skip(NO_COMPILER)
    build = module.built

    def asked(*said: Any) -> Any:
        found, why = build(*said)
        assert found is not None, why
        return found, why

    monkeypatch.setattr(module, "built", asked)


def minimum(a: Any, b: Any) -> Any:
    return build("minimum", as_expr(a), as_expr(b))


def drawn(*sizes: int) -> Tensor:
    return torch.randn(sizes)


def whole(low: int, high: int, *sizes: int) -> Tensor:
    return torch.randint(low, high, sizes)


DOC, BIAS, SLOPE, LIMIT = whole(0, 3, B, M), drawn(H, M + N), drawn(H) / 9, whole(0, M, B, 1, N, 1)
ROWS, LAST = drawn(H, N), 70 * drawn(N).abs()  # what a weight learns of each row, and the last key that it sees
ATTENDS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "causal at the end": {"causal": True, "align": "end"},
    "window": {"causal": True, "keep": lambda i, j: (i - j < 20) | (j < 4)},
    "both sides": {"keep": lambda i, j: abs(i - j) <= 9},
    "softcap": {"score": lambda s: torch.tanh(s / 3) * 3, "causal": True},
    "alibi": {"score": lambda s, h, i, j: s - abs(j - i) * torch.exp2(-h - 1.0)},
    "slopes": {"score": lambda s, h, i, j: s + table(SLOPE)[h] * (j - i), "causal": True},
    "relative bias": {"score": lambda s, h, i, j: s + table(BIAS)[h, i - j + M]},
    "documents": {"keep": lambda b, i, j: table(DOC)[b, i] == table(DOC)[b, j]},
    "a limit of each row": {"keep": lambda b, i, j: j <= table(LIMIT)[b, 0, i, 0]},
    "mod and div": {"keep": lambda i, j: ((i - j) % 3 == 0) & (j // 4 <= i // 4)},
    "where": {"score": lambda s, i, j: torch.where(j > i, s * 0.5, s + minimum(i - j, 5))},
    "functions": {"score": lambda s, i: torch.sigmoid(s) + F.softplus(s) + torch.sin(s) * torch.log(i + 1.0)},
    "sigmoid": {"weight": lambda s: torch.sigmoid(s), "normaliser": "none"},
    "relu squared": {"weight": lambda s: torch.relu(s) ** 2, "normaliser": "sum", "eps": 0.1, "causal": True},
    "sink": {"sink": lambda h: h * 0.5, "causal": True},
    "rows without a key": {"keep": lambda i, j: (j >= i - 3) & (j < i), "outputs": ("o", "lse")},
    "lse of a sum": {"weight": torch.exp, "normaliser": "sum", "sink": lambda h: h, "outputs": ("lse", "o")},
    "gathered rows": {"rows": whole(-1, M, B, 2, 50), "k_positions": whole(0, M, B, 2, M), "causal": True},
    "gathered by head": {"rows": whole(-1, M, 1, H, 50), "causal": True},
    "moved queries": {"q_positions": whole(0, M, B, N), "causal": True},
    "moved keys": {"k_positions": whole(0, M, M), "causal": True},
    "two segments": {
        "segments": [Segment(drawn(B, 4, 33, D), drawn(B, 4, 33, Dv), keep=lambda i, j: j < i % 7)],
        "causal": True,
    },
    "a learned sink": {"sink": lambda h: table(SLOPE)[h] * 5, "causal": True},
    "a learned weight": {
        "weight": lambda s, h, i: torch.sigmoid(s + table(ROWS)[h, i]) + torch.relu(s) * table(SLOPE)[h],
        "normaliser": "sum",
        "sink": lambda h, i: table(ROWS)[h, i] + 1.0,
        "keep": lambda i, j: j <= table(LAST)[i],
    },
    "tiles": {"tiles": Tiles(whole(-1, 6, B, 1, 13, 3), 8, 24), "causal": True},
    "tiles of no whole vector": {"tiles": Tiles(whole(-1, 7, B, 1, 17, 3), 6, 20), "causal": True},
    "a table of heads": {"kv_heads": torch.tensor([0, 0, 1, 0])},
}  # fmt: skip
AFTERWARDS: dict[str, dict[str, Any]] = {  # what a weight becomes once it is normalised
    "changed afterwards": {"weight": torch.sigmoid, "normaliser": "none", "after": lambda w, i: w / (i + 1.0)},
    "a logarithm afterwards": {"weight": torch.exp, "normaliser": "none", "after": lambda w: torch.log(w + 1)},
    "an exponential afterwards": {"normaliser": "none", "after": lambda w: torch.exp(-w) * w},
    "scaled afterwards": {"after": lambda w, h: w * (h + 0.5), "causal": True},
}
RELATIVES: dict[str, dict[str, Any]] = {
    "distances": {
        "relative": [Relative(drawn(H, 21, D) / 5, lambda i, j: minimum(i - j + 10, 20))],
        "causal": True,
        "align": "end",
    },
    "distances of keys": {
        "relative": [
            Relative(drawn(1, 33, D) / 5, lambda i, j: j - i + 16, of="k"),
            Relative(drawn(1, 9, D) / 5, lambda h, i, j: (i + j + h) % 9),
        ],
        "score": lambda s, r1: torch.tanh(s) + r1,
    },
}
SCANS: dict[str, dict[str, Any]] = {
    "plain": {},
    "features": {"feature": (lambda x: F.elu(x) + 1, torch.relu), "normaliser": "sum", "eps": 1e-4},
    "decay of a head": {"decay": torch.tensor([0.9, 0.5, 1.0, 0.0])},
    "decay of a row": {"log_decay": -drawn(B, H, N).abs()},
    "decay of a channel": {"decay": torch.sigmoid(drawn(B, H, N, D)), "feature": torch.exp, "normaliser": "sum"},
    "read before": {"decay": torch.sigmoid(drawn(B, H, N)), "read": "before", "outputs": ("o", "state")},
    "channels read before": {"decay": torch.sigmoid(drawn(H, D)), "read": "before", "outputs": ("o", "state", "norm")},
    "documents": {"reset": whole(0, 2, B, N).cumsum(-1) // 9, "decay": torch.sigmoid(drawn(H, D))[:, 0]},
    "rows that do not count": {
        "valid": whole(0, 2, N) > 0,
        "feature": torch.exp,
        "normaliser": "sum",
        "outputs": ("o", "state", "norm"),
    },
    "a state": {
        "state": drawn(B, H, D, Dv + 1).exp(),
        "feature": torch.exp,
        "normaliser": "sum",
        "outputs": ("o", "state"),
    },
}


def said(monkeypatch: pytest.MonkeyPatch, front: Any, op: str, call: Callable[[], Any]) -> tuple[Any, str]:
    """The tensors and the text that a front hands to its op."""
    given: list[Any] = []
    monkeypatch.setattr(front, op, lambda *arguments: given.extend(arguments) or [None] * 4)
    call()
    *tensors, text = given
    return [t if isinstance(t, list) else [t] for t in tensors], text


def wide(groups: Any) -> Any:
    return [[t.double() if t.is_floating_point() else t for t in group] for group in groups]


def same(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and torch.equal(a == -math.inf, b == -math.inf)
        size = b[b.isfinite()].abs().max().clamp(min=1)
        torch.testing.assert_close(a.double() / size, b / size, atol=tolerance, rtol=0)
