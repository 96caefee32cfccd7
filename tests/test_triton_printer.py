"""An expression printed as Triton is what torch makes of it: predicates and scores over (b, h, i, j) and tables."""

from __future__ import annotations

import pytest
import torch
import triton_interpreter  # noqa: F401 (kernels run in Python)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_tiles import INTEGERS, PREDICATES

from reattend.codegen.triton.arguments import looked_up
from reattend.codegen.triton.module import loaded
from reattend.codegen.triton.printer import triton_text
from reattend.codegen.triton.skeleton import text_of
from reattend.compiler.symbol_eval import evaluate
from reattend.compiler.symbols import Expr, as_expr, build, name

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy speaks of what is not taken of a `where`
ROWS, KEYS, BATCH, HEAD = 8, 16, 1, 2
FLOATS, WHOLES = torch.linspace(-2, 2, 15).view(3, 5), torch.arange(7, dtype=torch.int64).roll(3)
NAMES = {"i": "i[:, None]", "j": "j[None, :]"}
S = name("s")


def _scores(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    two = st.tuples(inner, inner)
    of_one = st.sampled_from(["tanh", "softplus", "relu", "elu", "sin", "cos", "abs", "sigmoid"])
    return st.one_of(
        two.map(lambda p: p[0] + p[1]),
        two.map(lambda p: p[0] - p[1]),
        two.map(lambda p: p[0] * p[1]),
        two.map(lambda p: build("minimum", *p)),
        two.map(lambda p: build("maximum", *p)),
        st.tuples(PREDICATES, inner, inner).map(lambda p: build("where", *p)),
        st.tuples(of_one, inner).map(lambda p: build(p[0], p[1])),
    )


LOOKUPS = st.one_of(
    st.tuples(INTEGERS, INTEGERS).map(lambda p: Expr("lookup", ("t0", *p))),
    INTEGERS.map(lambda e: Expr("lookup", ("t1", e))),
)
LEAVES = st.one_of(st.just(S), INTEGERS, LOOKUPS, st.floats(-2, 2, width=16).map(as_expr))
SCORES = st.recursive(LEAVES, _scores, max_leaves=4)
WHOLE_LOOKUPS = st.tuples(INTEGERS, INTEGERS).map(lambda p: Expr("lookup", ("t1", p[0])) <= p[1])
KEPT = st.one_of(PREDICATES, WHOLE_LOOKUPS, st.tuples(PREDICATES, WHOLE_LOOKUPS).map(lambda p: p[0] | p[1]))


def printed(expressions: list[Expr], kind: str) -> list[torch.Tensor]:
    """What one kernel gives for all of them, in a tile of rows and keys."""
    tables = {**looked_up(0, FLOATS), **looked_up(1, WHOLES)}
    lines = [text_of("functions"), "", "@triton.jit",
             f"def each(OUT, S, b, h, {', '.join(tables)}, ROWS: tl.constexpr, KEYS: tl.constexpr):",
             "    i, j = tl.arange(0, ROWS), tl.arange(0, KEYS)",
             "    place = i[:, None] * KEYS + j[None, :]", "    s = tl.load(S + place)"]  # fmt: skip
    for number, e in enumerate(expressions):
        text = triton_text(e, kind, NAMES, tables="fi")
        lines.append(f"    tl.store(OUT + {number * ROWS * KEYS} + place, tl.zeros((ROWS, KEYS), tl.float32) + {text})")
    out = torch.empty(len(expressions), ROWS, KEYS)
    loaded("\n".join(lines) + "\n").each[(1,)](out, scores(), BATCH, HEAD, *tables.values(), ROWS, KEYS)
    return list(out)


def scores() -> torch.Tensor:
    return torch.linspace(-3, 3, ROWS * KEYS).view(ROWS, KEYS)


def expected(e: Expr) -> torch.Tensor:
    names = {"s": scores().double(), "b": torch.tensor(BATCH), "h": torch.tensor(HEAD)}
    names |= {"i": torch.arange(ROWS)[:, None], "j": torch.arange(KEYS)[None, :]}
    found = torch.as_tensor(evaluate(e, names, {"t0": FLOATS.double(), "t1": WHOLES}))
    return found.double().reshape(found.shape[-2:]).expand(ROWS, KEYS)  # with lookups also (1, 1, ...)


@settings(max_examples=2, deadline=None, phases=[Phase.generate])
@given(st.lists(KEPT, min_size=10, max_size=10))
def test_predicates(several: list[Expr]) -> None:
    for e, found in zip(several, printed(several, "b"), strict=True):
        assert torch.equal(found.double(), expected(e)), str(e)


@settings(max_examples=2, deadline=None, phases=[Phase.generate])
@given(st.lists(SCORES, min_size=10, max_size=10))
def test_scores(several: list[Expr]) -> None:
    for e, found in zip(several, printed(several, "f"), strict=True):
        apart = (found.double() - expected(e)).abs().max() / expected(e).abs().max().clamp(min=1)
        assert apart < 1e-5, str(e)
