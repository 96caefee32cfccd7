"""LS attention against its two masks, row by row."""

from __future__ import annotations

from typing import Any

import pytest
from hosted_models import ids
from language_swaps import close, row_by_row, swapped

import reattend.passes  # noqa: F401 - fills the registry
from reattend.compiler.functional import attention
from reattend.compiler.problem import problem
from reattend.compiler.refusal import Refused


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("knobs", "long"),
    [({"n_long": 1}, {3}), ({"n_long": 3}, {1, 2, 3}), ({"long_heads": (2, 0)}, {0, 2}), ({"n_long": 0}, set())],
)
def test_masks(causal: bool, knobs: dict[str, Any], long: set[int]) -> None:
    q, k, v = problem(11, kv_heads=2)

    def seen(h: int, i: int) -> list[int]:
        return [j for j in range(11) if (j <= i or not causal) and (h in long or abs(i - j) < 3)]

    assert close(attention(q, k, v, "ls", causal=causal, local_window=3, **knobs), row_by_row(q, k, v, seen))


def test_in_a_llama() -> None:
    model, fast = swapped("ls", n_long=1, local_window=3)
    x = ids(2, 17)
    full, got = model(input_ids=x).logits, fast(input_ids=x).logits
    assert (got - full).abs().max() > 1e-4
    assert close(got[:, :3], full[:, :3])


@pytest.mark.parametrize(
    ("knobs", "match"),
    [({"n_long": 5}, "5 long heads of 4"), ({"long_heads": (4,)}, "of 4"), ({"local_window": 0}, "at least 1")],
)
def test_refused(knobs: dict[str, Any], match: str) -> None:
    q, k, v = problem()
    with pytest.raises(Refused, match=match):
        attention(q, k, v, "ls", causal=True, **knobs)
