"""S2-Attention against its block rule written out: phases of heads, groups, dense heads, both kinds of strides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hosted_models import ids
from language_swaps import close, row_by_row, swapped

import reattend.passes  # noqa: F401 - fills the registry
from reattend.compiler.functional import attention
from reattend.compiler.problem import problem
from reattend.compiler.refusal import Refused


def allowed(a: int, c: int, h: int, heads: int, kv: int, causal: bool, **knobs: Any) -> bool:
    """The card's rule for query block a and key block c, in query head h."""
    local, stride = knobs["local_blocks"], knobs["vert_stride"]
    g = 0 if knobs.get("homo_head") else h // (heads // kv)
    if causal and c > a:
        return False
    if g >= kv - knobs.get("num_dense_heads", 0):
        return True
    if causal:
        return (
            a - c < local or (c + g * max(1, int(stride / heads)) + knobs.get("head_sliding_offset", 0)) % stride == 0
        )
    left, right = local if isinstance(local, tuple) else (local, local)
    return (max(0, a - c - left + 1) + max(0, c - a - right + 1)) % stride == 0


CASES = [
    (True, {"block_size": 2, "local_blocks": 1, "vert_stride": 3}),
    (True, {"block_size": 3, "local_blocks": 2, "vert_stride": 9, "head_sliding_offset": 2}),
    (True, {"block_size": 2, "local_blocks": 1, "vert_stride": 5, "num_dense_heads": 1}),
    (True, {"block_size": 1, "local_blocks": 2, "vert_stride": 4, "homo_head": True}),
    (False, {"block_size": 2, "local_blocks": 2, "vert_stride": 3}),
    (False, {"block_size": 1, "local_blocks": (1, 3), "vert_stride": 4}),
]


@pytest.mark.parametrize(("causal", "knobs"), CASES, ids=str)
@pytest.mark.parametrize("kv", [4, 2])
def test_rule(causal: bool, knobs: dict[str, Any], kv: int) -> None:
    q, k, v = problem(15, kv_heads=kv)
    size = knobs["block_size"]

    def seen(h: int, i: int) -> list[int]:
        blocks = [j for j in range(15) if allowed(i // size, j // size, h, 4, kv, causal, **knobs)]
        return [j for j in blocks if j <= i or not causal]

    assert close(attention(q, k, v, "s2", causal=causal, **knobs), row_by_row(q, k, v, seen))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("count", [1, 4])
def test_a_pattern_of_ones_own(causal: bool, count: int) -> None:
    q, k, v = problem(11, kv_heads=2)
    chosen = torch.rand(count, 4, 4, generator=torch.Generator().manual_seed(3)) < 0.4
    chosen |= torch.eye(4, dtype=torch.bool)
    chosen = chosen.tril() if causal else chosen

    def seen(h: int, i: int) -> list[int]:
        return [j for j in range(11) if chosen[h % count, i // 3, j // 3] and (j <= i or not causal)]

    got = attention(q, k, v, "s2", causal=causal, block_size=3, pattern=chosen.int().tolist())
    assert close(got, row_by_row(q, k, v, seen))


def test_a_block_beyond_the_pattern_sees_itself() -> None:
    q, k, v = problem(7)
    got = attention(q, k, v, "s2", causal=True, block_size=3, pattern=[[[1, 0], [1, 1]]])
    assert close(got, row_by_row(q, k, v, lambda h, i: range(6 if i == 6 else 0, i + 1)))


def test_a_pattern_that_comes_back_says_what_a_cache_pays(caplog: pytest.LogCaptureFixture) -> None:
    q, k, v = problem(9)
    for rows, said in (([[1, 0, 0], [1, 1, 0], [0, 1, 1]], False), ([[1, 0, 0], [0, 1, 0], [1, 0, 1]], True)):
        caplog.clear()
        attention(q, k, v, "s2", causal=True, block_size=3, pattern=[rows])
        assert ("comes back" in caplog.text) is said
    with pytest.raises(Refused, match="a pattern with heads or positions of a rule"):
        attention(q, k, v, "s2", causal=True, pattern=[[[1]]], homo_head=True)


def pattern(causal: bool, block: int) -> str:
    """Which of 8 blocks a query of one block sees, read from the weights of equal keys."""
    q, k = torch.zeros(1, 1, 16, 4), torch.zeros(1, 1, 16, 4)
    knobs = {"block_size": 2, "local_blocks": 2, "vert_stride": 3, "homo_head": True}
    o = attention(q, k, torch.eye(16)[None, None], "s2", causal=causal, **knobs)
    blocks = (o[0, 0, 2 * block + 1].view(8, 2).sum(1) > 0).int().tolist()
    return "".join(map(str, blocks[: block + 1] if causal else blocks))


def test_the_patterns_of_eight_blocks() -> None:
    rows = [pattern(True, block) for block in range(8)]
    assert rows == ["1", "11", "111", "1011", "10011", "100111", "1001011", "10010011"]
    assert (pattern(False, 0), pattern(False, 3)) == ("11001001", "00111001")


def test_heads_together_see_everything() -> None:
    q, k, v = torch.zeros(1, 4, 12, 4), torch.zeros(1, 4, 12, 4), torch.eye(12).expand(1, 4, 12, 12)
    o = attention(q, k, v, "s2", causal=True, block_size=2, local_blocks=1, vert_stride=4, head_sliding_step=1)
    assert bool(((o.sum(1) > 0) == torch.ones(12, 12).tril().bool()).all())


def test_heads_one_step_on_are_blocks_one_phase_on() -> None:
    q, k, v = problem(18)
    knobs = {"block_size": 2, "local_blocks": 1, "vert_stride": 4, "head_sliding_step": 1}
    first = attention(q, k, v, "s2", causal=True, **knobs)
    moved = attention(*(t.roll(1, 1) for t in (q, k, v)), "s2", causal=True, head_sliding_offset=3, **knobs)
    assert close(moved.roll(-1, 1), first)


def test_in_a_llama() -> None:
    model, fast = swapped("s2", block_size=2, local_blocks=1, vert_stride=3)
    x = ids(2, 17)
    assert (fast(input_ids=x).logits - model(input_ids=x).logits).abs().max() > 1e-4
    assert close(fast(input_ids=x[:, :2]).logits, model(input_ids=x[:, :2]).logits), "one block sees all of itself"


@pytest.mark.parametrize(
    ("knobs", "match"),
    [
        ({"local_blocks": (1, 2)}, "give one number"),
        ({"num_dense_heads": 5}, "5 of them dense"),
        ({"num_kv_heads": 3}, "3 key heads"),
        ({"local_blocks": 0}, "own block"),
        ({"pattern": [[[1, 0], [1, 0]]]}, "every own block"),
        ({"pattern": [[[1]], [[1]]]}, "2 heads for 4"),
        ({"pattern": [[[1, 1], [1, 1]]]}, "to the right"),
        ({"homo_head": True, "num_dense_heads": 1}, "may differ"),
    ],
)
def test_refused(knobs: dict[str, Any], match: str) -> None:
    q, k, v = problem()
    with pytest.raises(Refused, match=match):
        attention(q, k, v, "s2", causal=True, **knobs)
