"""Programs that share a few rows' keys give what one program gives: values against float64, in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import triton_interpreter  # noqa: F401 (kernels run in Python)
from kernel_calls import AFTERWARDS, ATTENDS, B, D, Dv, H, M, drawn, said, same, wide
from torch import Tensor

from reattend.codegen.triton import launch
from reattend.codegen.triton.blocks import Blocks
from reattend.codegen.triton.launch_shares import why_not_shared
from reattend.codegen.triton.launching import recorded
from reattend.compiler.primitives import attend as attend_front
from reattend.compiler.primitives.attend import attend
from reattend.compiler.primitives.attend_meaning import attend_meaning

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:overflow:RuntimeWarning",
                                        "ignore:invalid value:RuntimeWarning")  # fmt: skip
ROWS = 3
DIFFER = ("window", "relu squared", "sink", "rows without a key", "lse of a sum", "moved queries", "two segments")
ONE_BY_ONE = [name if name in DIFFER else pytest.param(name, marks=pytest.mark.slow)
              for name in ATTENDS | AFTERWARDS if "tiles" not in name]  # fmt: skip


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_shares_are_joined(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More shares than some ranges have tiles: what is left without a key counts nothing."""
    how = {"align": "end", **(ATTENDS | AFTERWARDS)[name]}
    if "q_positions" in how:
        how["q_positions"] = how["q_positions"][:, -ROWS:]
    q, k, v = drawn(B, H, ROWS, D), drawn(B, M, 2, D).transpose(1, 2), drawn(B, 2, M, Dv)
    groups, text = said(monkeypatch, attend_front, "attend_op", lambda: attend(q, k, v, **how))
    found = launch.run(groups, text, blocks=Blocks(16, 32, 4, 1), shares=3)
    same(found, attend_meaning(wide(groups), text), 4e-6)


def launches(q: Tensor, k: Tensor, monkeypatch: pytest.MonkeyPatch, **how: Any) -> list[tuple[str, tuple[int, ...]]]:
    groups, text = said(monkeypatch, attend_front, "attend_op", lambda: attend(q, k, k, **how))
    with recorded("cuda:90") as made:
        launch.run(groups, text)
    return [(name, grid) for _, name, grid, _ in made]


def test_one_token_shares_many_keys_and_a_whole_text_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    one, few, all_, keys = (drawn(1).expand(1, h, n, 64) for h, n in ((32, 1), (8, 1), (8, 8192), (8, 8192)))
    assert launches(one, keys, monkeypatch)[0] == ("share", (8, 64))
    assert [name for name, _ in launches(few, keys, monkeypatch)] == ["share", "join"]
    assert [name for name, _ in launches(few, keys[:, :, :64], monkeypatch)] == ["forward"]
    assert [name for name, _ in launches(all_, keys, monkeypatch)] == ["forward"]
    near = launches(few, keys, monkeypatch, align="end", causal=True, keep=lambda i, j: i - j < 64)
    assert [name for name, _ in near] == ["forward"]


def test_what_runs_along_the_keys_in_order_is_not_shared() -> None:
    reason = "what runs along the keys in their order: sums and maxima"
    assert why_not_shared('{"normaliser":"stick","score":"s"}') == reason
    assert why_not_shared('{"score":"s","tiles":["t0",8,8]}') == "listed tiles"
