"""Classes of tiles against all pairs, and every reading of one predicate against the others."""

from __future__ import annotations

import ctypes
from importlib import resources

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from reattend.codegen.cpu.printer import box
from reattend.codegen.cpu.skeleton import function
from reattend.codegen.cpu.toolchain import toolchain
from reattend.compiler.refusal import Refused
from reattend.compiler.symbol_eval import evaluate
from reattend.compiler.symbol_text import parse
from reattend.compiler.symbols import Expr, name
from reattend.compiler.tiles import EMPTY, FULL, PARTIAL, tiles_of

I, J = name("i"), name("j")
BANDS = (
    "j <= i",
    "(j <= i) & (i <= j + 7)",
    "abs(i - j) <= 9",
    "2*i <= 3*j + 5",
    "i != j",
    "i == j",
    "j <= i + M - N",
    "True",
    "False",
)
SIZES = ((50, 70, (8, 8)), (33, 33, (16, 8)), (70, 50, (7, 9)), (1, 5, (64, 64)))


def pairs(predicate: Expr, n: int, m: int, offset: int = 0) -> Tensor:
    i, j = torch.arange(n).view(-1, 1) + offset, torch.arange(m).view(1, -1)
    names = {"i": i, "j": j, "N": n, "M": m, "b": torch.tensor(1), "h": torch.tensor(2)}
    return torch.as_tensor(evaluate(predicate, names, {})).bool().expand(n, m)


def by_force(kept: Tensor, tile: tuple[int, int]) -> list[list[int]]:
    cut = [list(r.split(tile[1], 1)) for r in kept.split(tile[0], 0)] if kept.numel() else []
    return [[FULL if bool(c.all()) else PARTIAL if bool(c.any()) else EMPTY for c in row] for row in cut]


@pytest.mark.parametrize(("n", "m", "tile"), SIZES)
@pytest.mark.parametrize("text", BANDS)
def test_the_classes_of_a_band_are_exact(text: str, n: int, m: int, tile: tuple[int, int]) -> None:
    for offset in (0, m - n):
        found = tiles_of(parse(text), n, m, tile, offset=offset)
        assert not isinstance(found.seen, Tensor), "in closed form"
        whole = by_force(pairs(parse(text), n, m, offset), tile)
        assert found.classes().tolist() == whole
        assert found.counts == tuple(sum(row.count(kind) for row in whole) for kind in (EMPTY, PARTIAL, FULL))


@pytest.mark.parametrize(("n", "m", "tile"), SIZES)
def test_a_band_with_sinks_is_visited_exactly_and_never_called_whole_where_it_is_not(
    n: int, m: int, tile: tuple[int, int]
) -> None:
    """Where neither of two conditions covers a tile alone but both do together, the tile counts as cut."""
    predicate = parse("(j <= i) & ((i <= j + 11) | (j <= 3))")
    found, whole = tiles_of(predicate, n, m, tile).classes(), torch.tensor(by_force(pairs(predicate, n, m), tile))
    assert torch.equal(found > EMPTY, whole > EMPTY) and bool((found <= whole).all())


@pytest.mark.parametrize("text", ["i // 8 == j // 8", "((i - j) % 4 == 0) & (j <= i)", "minimum(i, j) <= 12"])
def test_blocks_and_strides_are_asked_tile_by_tile_and_found_exactly(text: str) -> None:
    found = tiles_of(parse(text), 64, 48, (8, 8))
    assert isinstance(found.seen, Tensor) and found.classes().tolist() == by_force(pairs(parse(text), 64, 48), (8, 8))


@pytest.mark.parametrize("text", ["i % 3.9 < 3", "i // 2.5 <= j", "i * 0.5 <= j", "i <= j + 2.5"])
def test_numbers_with_a_fraction_are_never_wrong(text: str) -> None:
    found = tiles_of(parse(text), 40, 40, (8, 8)).classes()
    whole = torch.tensor(by_force(pairs(parse(text), 40, 40), (8, 8)))
    assert ((found == whole) | (found == PARTIAL)).all()


def test_what_no_rule_knows_is_cut() -> None:
    found = tiles_of(parse("(t0[i] == t0[j]) & (j <= i)"), 64, 64, (16, 16))
    assert found.counts == (6, 10, 0)
    assert "0.0 % whole, 62.5 % cut, 37.5 % never visited" in str(found)


def test_a_long_band_needs_no_tile_and_anything_else_so_long_is_refused() -> None:
    found = tiles_of(parse("(j <= i) & ((i <= j + 255) | (j <= 3))"), 1 << 20, 1 << 20)
    assert sum(found.counts) == 1 << 28 and found.counts[2] == 49146
    with pytest.raises(Refused, match="16384 x 16384 tiles"):
        tiles_of(parse("i // 8 == j // 8"), 1 << 20, 1 << 20)


# --- predicates at random ---------------------------------------------------------------------------------------------

NUMBERS = st.integers(-6, 6)


def _integers(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    two = st.tuples(inner, inner)
    by = st.integers(1, 5)
    return st.one_of(
        two.map(lambda p: p[0] + p[1]),
        two.map(lambda p: p[0] - p[1]),
        st.tuples(inner, NUMBERS).map(lambda p: p[0] * p[1]),
        st.tuples(inner, by).map(lambda p: p[0] // p[1]),
        st.tuples(inner, by).map(lambda p: p[0] % p[1]),
        inner.map(abs),
    )


INTEGERS = st.recursive(st.sampled_from([I, J, name("h"), I - J, I + 3, J - 2]), _integers, max_leaves=4)
COMPARED = st.tuples(INTEGERS, INTEGERS | NUMBERS, st.sampled_from(["le", "lt", "eq", "ne"])).map(
    lambda p: {"le": p[0] <= p[1], "lt": p[0] < p[1], "eq": p[0] == p[1], "ne": p[0] != p[1]}[p[2]]
)
PREDICATES = st.recursive(
    COMPARED,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda p: p[0] & p[1]),
        st.tuples(inner, inner).map(lambda p: p[0] | p[1]),
        inner.map(lambda p: ~p),
    ),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None)
@given(PREDICATES, st.sampled_from([(4, 4), (3, 8), (8, 5)]))
def test_a_class_is_never_wrong(predicate: Expr, tile: tuple[int, int]) -> None:
    predicate = predicate.replace({"h": 2})
    found = tiles_of(predicate, 19, 23, tile).classes()
    whole = torch.tensor(by_force(pairs(predicate, 19, 23), tile))
    assert ((found == whole) | (found == PARTIAL)).all(), str(predicate)


@settings(max_examples=60, deadline=None)
@given(PREDICATES)
def test_a_text_read_again_is_the_same_predicate(predicate: Expr) -> None:
    assert parse(predicate.text).text == predicate.text
    assert torch.equal(pairs(parse(predicate.text), 9, 11), pairs(predicate, 9, 11))


# --- as C++ -----------------------------------------------------------------------------------------------------------

LANES = (resources.files("reattend.codegen.cpu") / "lanes.hpp").read_text(encoding="utf-8")
_LOOPS = """
extern "C" void pairs(int32_t which, int32_t n, int32_t m, int32_t* out) {
    for (int i = 0; i < n; ++i)
        for (int j = 0; j < m; j += VL) {
            vi keys;
            for (int lane = 0; lane < VL; ++lane) keys[lane] = j + lane;
            const vi kept = KEEP[which](1, 2, i, keys);
            for (int lane = 0; lane < VL && j + lane < m; ++lane) out[i * m + j + lane] = kept[lane] != 0;
        }
}
extern "C" int32_t classed(int32_t which, int32_t i0, int32_t i1, int32_t j0, int32_t j1) {
    return BOX[which](1, 2, i0, i1, j0, j1);
}
"""


def _library(predicates: list[Expr]) -> ctypes.CDLL:
    count = len(predicates)
    said = [function(f"vi keep{k}(int b, int h, int i, vi j)", p, "vb") for k, p in enumerate(predicates)]
    said += [
        f"INLINE int box{k}(int b, int h, int i0, int i1, int j0, int j1) {{ return {box(p)}; }}"
        for k, p in enumerate(predicates)
    ]
    for table, kind, arguments in (("KEEP", "vi", "int, int, int, vi"), ("BOX", "int", "int, int, int, int, int, int")):
        names = ", ".join(f"{table.lower()}{k}" for k in range(count))
        said.append(f"{kind} (*const {table}[])({arguments}) = {{ {names} }};")
    tools = toolchain()
    assert tools is not None
    return tools.build("\n".join([LANES, *said, _LOOPS]))


@pytest.mark.skipif(toolchain() is None, reason="needs a C++ compiler")
@settings(max_examples=3, deadline=None, phases=[Phase.generate])
@given(st.lists(PREDICATES, min_size=25, max_size=25))
def test_cpp_keeps_what_torch_keeps(predicates: list[Expr]) -> None:
    n, m, tile = 19, 23, (4, 8)
    library = _library(predicates)
    for which, predicate in enumerate(predicates):
        out = torch.full((n, m), -1, dtype=torch.int32)
        library.pairs(which, n, m, ctypes.c_void_p(out.data_ptr()))
        kept = pairs(predicate, n, m)
        assert torch.equal(out.bool(), kept) and bool((out >= 0).all()), str(predicate)
        classes = [
            [
                library.classed(which, i, min(i + tile[0], n) - 1, j, min(j + tile[1], m) - 1)
                for j in range(0, m, tile[1])
            ]
            for i in range(0, n, tile[0])
        ]
        assert classes == tiles_of(predicate.replace({"h": 2}), n, m, tile).classes().tolist(), str(predicate)
