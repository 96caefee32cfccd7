"""Every line of the analysis' specification is derived from equations; names decide nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from card_cascades import CASES, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reattend.compiler.cascades.analysis import Verdict, analyse, reading
from reattend.compiler.cascades.einsum import Cascade
from reattend.compiler.cascades.nest import LoopNest
from reattend.compiler.cascades.reading import read_cascade
from reattend.compiler.cascades.running import run
from reattend.compiler.refusal import Refused


def verdict(case: Case) -> Verdict:
    return analyse(read_cascade(case.text), case.keys.split(), case.queries.split(), poly=case.poly)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_line_of_the_table_is_derived(case: Case) -> None:
    found = verdict(case)
    for tensor, fiber, passes, least, kinds in case.reads:
        got = reading(found.cascade, tensor, tuple(fiber.split()), poly=case.poly)
        assert (got.passes, got.least, ", ".join(got.kinds)) == (passes, least, kinds), str(got)
    if case.category:
        assert found.category == case.category
    own = [b for b in found.barriers if case.soft or case.hard]
    if case.soft or case.hard:
        assert {b.name for b in own if b.soft} == set(case.soft.split())
        assert {b.name for b in own if not b.soft} == set(case.hard.split())
    if case.sweeps:
        assert found.sweeps == case.sweeps
    assert found.unsafe is case.unsafe
    for barrier, node, type_ in case.changes:
        changes = dict(next(b for b in found.barriers if b.name == barrier).changes)
        assert str(changes[node]) == type_
    if case.written:
        assert str(found.written) == case.written
    if case.running:
        assert str(found.running) == case.running


# --- the loop nest that follows, run ----------------------------------------------------------------------------------

SIZES = {"m": 7, "m1": 4, "m0": 2, "p": 3, "e": 4, "f": 5, "a": 3, "k": 6, "d": 7}


def drawn(cascade: Cascade, seed: int = 0) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(seed)
    values = {
        o.name: torch.randn([SIZES[r] for r in o.ranks], generator=made, dtype=torch.float64) for o in cascade.operands
    }
    if "L" in values:
        values["L"] = torch.tensor(float(SIZES["d"]), dtype=torch.float64)
    return values


RUN = [c for c in CASES if c.run]


def close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", RUN, ids=lambda c: c.name)
@pytest.mark.parametrize("tile", [1, 3, 0])
def test_the_loop_nest_is_the_cascade(case: Case, tile: int) -> None:
    cascade = read_cascade(case.text)
    nest = LoopNest(cascade, case.keys.split()[0], poly=case.poly)
    values = drawn(cascade)
    whole = SIZES[nest.rank]
    close(nest.run(values, tile=tile or whole), run(cascade, values))
    least = max(least for _, fiber, _, least, _ in case.reads if fiber == case.keys)
    assert nest.passes == least or case.sweeps == nest.passes


def trees(leaves: list[int]) -> st.SearchStrategy[Any]:
    if len(leaves) == 1:
        return st.just(leaves[0])
    return st.integers(1, len(leaves) - 1).flatmap(lambda k: st.tuples(trees(leaves[:k]), trees(leaves[k:])))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_states_merge_along_any_tree_and_in_any_order_where_that_is_derived(data: st.DataObject) -> None:
    case = data.draw(st.sampled_from(RUN))
    cascade = read_cascade(case.text)
    nest = LoopNest(cascade, case.keys.split()[0], poly=case.poly)
    whole, sizes = SIZES[nest.rank], []
    while sum(sizes) < whole:
        sizes.append(data.draw(st.integers(1, whole - sum(sizes))))
    leaves = list(range(len(sizes)))
    if nest.commutes:
        leaves = data.draw(st.permutations(leaves))
    elif nest.reverse:
        leaves.reverse()
    values = drawn(cascade, data.draw(st.integers(0, 3)))
    if nest.in_order:
        with pytest.raises(Refused, match="tiles in order"):
            nest.run(values, tile=sizes, tree=data.draw(trees(leaves)))
        close(nest.run(values, tile=sizes), run(cascade, values))
    else:
        close(nest.run(values, tile=sizes, tree=data.draw(trees(leaves))), run(cascade, values))
