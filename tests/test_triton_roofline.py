"""The roofline ranks blocks as one would expect: more work, more bytes or fewer blocks at once never take less time."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reattend.codegen.triton.blocks import Blocks, forward_blocks
from reattend.codegen.triton.roofline import MACHINES, Work, best_shares, forward_work, occupancy, ranked, seconds

TARGETS = st.sampled_from(sorted(MACHINES))
BLOCKS = st.builds(
    Blocks,
    st.sampled_from((16, 32, 64, 128)),
    st.sampled_from((16, 32, 64, 128)),
    st.sampled_from((4, 8)),
    st.integers(1, 3),
)
REGISTERS, SHARED = st.integers(16, 255), st.integers(1024, 64 * 1024)
WORK = st.builds(
    forward_work,
    st.integers(1, 16),
    st.sampled_from((8, 32)),
    st.sampled_from((2, 8)),
    st.integers(1, 16384),
    st.integers(1, 65536),
    st.sampled_from((64, 128)),
    st.sampled_from((64, 128)),
    st.sampled_from((1.0, 0.5, 0.01)),
)
LONG = forward_work(1, 8, 8, 8192, 8192, 64, 64, 0.5)


def programs(blocks: Blocks, rows: int = 8192, heads: int = 8) -> int:
    return -(-rows // blocks.rows) * heads


@given(BLOCKS, REGISTERS, SHARED, st.integers(1, 64), st.integers(1, 64 * 1024), TARGETS)
def test_what_takes_more_of_a_processor_is_held_less_often(
    blocks: Blocks, registers: int, shared: int, more: int, bytes_: int, target: str
) -> None:
    held = occupancy(blocks, registers, shared, target)
    assert occupancy(blocks, registers + more, shared, target) <= held
    assert occupancy(blocks, registers, shared + bytes_, target) <= held
    assert occupancy(replace(blocks, warps=2 * blocks.warps), registers, shared, target) <= held
    gpu = MACHINES[target]
    assert held * blocks.warps <= gpu.warps and held * shared <= gpu.shared
    assert held * blocks.warps * gpu.lanes * registers <= gpu.registers


@given(WORK, BLOCKS, REGISTERS, SHARED, st.integers(1, 100_000), TARGETS)
def test_more_to_do_takes_no_less_time(
    work: Work, blocks: Blocks, registers: int, shared: int, count: int, target: str
) -> None:
    def taken(of: Work) -> float:
        return seconds(of, count, blocks, registers, shared, target)

    for field in ("products", "scores", "bytes", "read"):
        assert taken(replace(work, **{field: 2 * getattr(work, field)})) >= taken(work)
    assert taken(work) > 0


@given(WORK, BLOCKS, SHARED, TARGETS)
def test_time_is_bound_by_the_data_sheet(work: Work, blocks: Blocks, shared: int, target: str) -> None:
    """However full a device is, it multiplies and reads no faster than it can."""
    gpu = MACHINES[target]
    taken = seconds(work, 10**6, blocks, 32, shared, target)
    assert taken >= work.products / gpu.products and taken >= work.bytes / gpu.bandwidth


@given(BLOCKS, SHARED, TARGETS)
def test_of_the_same_blocks_the_one_with_fewer_registers_is_not_behind(
    blocks: Blocks, shared: int, target: str
) -> None:
    """Over whole waves: a last wave that leaves processors idle may turn it round."""
    gpu = MACHINES[target]
    low, high = (occupancy(blocks, registers, shared, target) for registers in (64, 128))
    if high == 0:
        assert seconds(LONG, 1, blocks, 128, shared, target) == math.inf
        return
    count = gpu.processors * math.lcm(low, high)
    times = [seconds(LONG, count, blocks, registers, shared, target) for registers in (64, 128)]
    assert times[0] <= times[1] * (1 + 1e-9)


@pytest.mark.parametrize("target", sorted(MACHINES))
def test_a_ranking_begins_with_the_fastest_and_ends_with_what_does_not_fit(target: str) -> None:
    tall, short = Blocks(128, 64, 8, 2), Blocks(16, 16, 8, 2)
    too_large = replace(tall, stages=3)
    found = ranked(LONG, 8192, 8, {short: (128, 8192), too_large: (128, 1 << 20), tall: (128, 32768)}, target)
    assert [time for time, _ in found] == sorted(time for time, _ in found)
    assert found[0][1] == tall, "16 x 16 leaves most of a matrix unit idle and reads every key eight times as often"
    assert found[-1] == (math.inf, too_large)


@pytest.mark.parametrize("target", sorted(MACHINES))
def test_tall_blocks_read_less(target: str) -> None:
    bound_by_reading = replace(LONG, products=0.0, scores=0.0)
    times = [seconds(bound_by_reading, 10**4 * (128 // rows), Blocks(rows, 64, 4, 2), 64, 8192, target)
             for rows in (16, 32, 64, 128)]  # fmt: skip
    assert times == sorted(times, reverse=True)


@given(st.integers(1, 4096), st.sampled_from((4, 8, 64, 512)), TARGETS)
def test_shares_are_no_more_than_tiles_and_fewer_where_programs_are_many(tiles: int, heads: int, target: str) -> None:
    blocks = forward_blocks(128, 128, 4, 16, target)
    work = forward_work(1, 4 * heads, heads, 1, tiles * blocks.keys, 128, 128, 1.0)
    count = best_shares(work, heads, tiles, 4 * heads * 130, blocks, target)
    assert 1 <= count <= max(tiles, 1) and count & (count - 1) == 0
    if heads >= 8 * MACHINES[target].processors:
        assert count == 1


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("target", sorted(MACHINES))
def test_default_blocks_come_near_the_ceiling(target: str, dim: int) -> None:
    """With the registers and shared memory that they were compiled to; there the last lies at 1 / 8 of all products."""
    stored = json.loads((Path(__file__).resolve().parent.parent / "docs" / "triton_kernels.json").read_text())
    rows = [row for of in stored.values() for row in of if row["kernel"] == "forward" and row["dim"] == dim]
    mine = [row for row in rows if row["target"] == target and row["case"] == "causal"]
    blocks = forward_blocks(dim, dim, 8192, 16, target)
    for row in mine:
        taken = seconds(forward_work(1, 8, 8, 8192, 8192, dim, dim, 0.5), programs(blocks), blocks,
                        row["registers"], row["shared"], target)  # fmt: skip
        gpu = MACHINES[target]
        ceiling = 2 * 8 * 8192 * 8192 * 0.5 * (dim + dim) / gpu.products
        assert ceiling < taken < 8 * ceiling
