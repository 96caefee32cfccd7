"""Expressions mean what the same Python function means on tensors, and their text reads back as itself."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reattend.compiler.refusal import Refused
from reattend.compiler.symbol_eval import evaluate
from reattend.compiler.symbol_math import latex, to_sympy
from reattend.compiler.symbol_read import read
from reattend.compiler.symbol_text import parse
from reattend.compiler.symbols import FUNCTIONS, Expr, build, const, name, table

SIZE = 5
I, J = torch.arange(SIZE).view(SIZE, 1) - 2, torch.arange(SIZE).view(1, SIZE)
S = torch.linspace(-2.0, 2.0, SIZE * SIZE, dtype=torch.float64).view(SIZE, SIZE)
VALUES: dict[str, Any] = {"i": I, "j": J, "s": S}
BIAS = torch.linspace(-1.0, 1.0, SIZE, dtype=torch.float64)

Pair = tuple[Callable[[], Any], str]  # what plain torch computes, and the same as text for the expression


def _whole(draw: Callable[..., Any], depth: int) -> tuple[Any, Any]:
    """(torch value, expression) of an integer."""
    kind = draw(st.sampled_from(["i", "j", "const"] if depth == 0 else ["i", "j", "const", "+", "-", "*", "//", "%"]))
    if kind in ("i", "j"):
        return VALUES[kind], name(kind)
    if kind == "const":
        value = draw(st.integers(-4, 7))
        return torch.tensor(value), const(value)
    (a, x), (c, y) = _whole(draw, depth - 1), _whole(draw, depth - 1)
    if kind in ("//", "%"):
        divisor = draw(st.integers(-4, 4).filter(bool))
        return (a // divisor, x // divisor) if kind == "//" else (a % divisor, x % divisor)
    return {"+": lambda: (a + c, x + y), "-": lambda: (a - c, x - y), "*": lambda: (a * c, x * y)}[kind]()


def _real(draw: Callable[..., Any], depth: int) -> tuple[Any, Any]:
    if depth == 0:
        return draw(st.sampled_from([(S, name("s")), (torch.tensor(0.25).double(), const(0.25))]))
    kind = draw(
        st.sampled_from(["+", "-", "*", "/", "minimum", "maximum", "where", "tanh", "sigmoid", "abs", "relu", "i"])
    )
    if kind == "i":
        a, x = _whole(draw, depth - 1)
        return a * BIAS[2], x * float(BIAS[2])
    a, x = _real(draw, depth - 1)
    if kind in ("tanh", "sigmoid", "abs", "relu"):
        return getattr(torch, kind)(a), build(kind, x)
    c, y = _real(draw, depth - 1)
    if kind == "where":
        if x.op == y.op == "const":  # torch gives two plain numbers its default type, not that of s
            return a, x
        m, z = _truth(draw, depth - 1)
        return torch.where(m, a, c), build("where", z, x, y)
    if kind in ("minimum", "maximum"):
        return getattr(torch, kind)(a, c), build(kind, x, y)
    if kind == "/":
        return a / 3.0, x / 3.0
    return {"+": lambda: (a + c, x + y), "-": lambda: (a - c, x - y), "*": lambda: (a * c, x * y)}[kind]()


def _truth(draw: Callable[..., Any], depth: int) -> tuple[Any, Any]:
    compare = ["<=", "<", ">=", ">", "==", "!="]
    kind = draw(st.sampled_from(compare if depth == 0 else [*compare, "&", "|", "~"]))
    if kind == "~":
        a, x = _truth(draw, depth - 1)
        return ~a, ~x
    if kind in ("&", "|"):
        (a, x), (c, y) = _truth(draw, depth - 1), _truth(draw, depth - 1)
        return (a & c, x & y) if kind == "&" else (a | c, x | y)
    (a, x), (c, y) = _whole(draw, max(depth - 1, 0)), _whole(draw, max(depth - 1, 0))
    return {
        "<=": lambda: (a <= c, x <= y),
        "<": lambda: (a < c, x < y),
        ">=": lambda: (a >= c, x >= y),
        ">": lambda: (a > c, x > y),
        "==": lambda: (a == c, x == y),
        "!=": lambda: (a != c, x != y),
    }[kind]()


@st.composite
def expressions(draw: Callable[..., Any]) -> tuple[Any, Any]:
    make = draw(st.sampled_from([_whole, _real, _truth]))
    found: tuple[Any, Any] = make(draw, draw(st.integers(0, 3)))
    return found


@settings(max_examples=400)
@given(expressions())
def test_an_expression_computes_what_torch_computes(pair: tuple[torch.Tensor, Expr]) -> None:
    plain, expr = pair
    got = torch.as_tensor(evaluate(expr, VALUES, {}), dtype=torch.float64)
    torch.testing.assert_close(
        got.expand(SIZE, SIZE), plain.double().expand(SIZE, SIZE), atol=1e-9, rtol=1e-9, equal_nan=True
    )


@settings(max_examples=400)
@given(expressions())
def test_text_reads_back_as_itself(pair: tuple[torch.Tensor, Expr]) -> None:
    _, expr = pair
    again = parse(expr.text)
    assert again.text == expr.text
    plain, read_back = (torch.as_tensor(evaluate(e, VALUES, {}), dtype=torch.float64) for e in (expr, again))
    torch.testing.assert_close(plain, read_back, atol=1e-9, rtol=1e-9, equal_nan=True)


@settings(max_examples=60)
@given(expressions())
def test_sympy_means_the_same(pair: tuple[torch.Tensor, Expr]) -> None:
    plain, expr = pair
    at = (1, 3)
    names = {n: VALUES[n].expand(SIZE, SIZE)[at].item() for n in VALUES}
    found = sympy.sympify(to_sympy(expr))
    found = found.subs({symbol: names[symbol.name] for symbol in found.free_symbols})
    expected = plain.expand(SIZE, SIZE)[at].item()
    if isinstance(expected, bool):
        assert bool(found) is expected
    else:
        assert float(found) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=100)
@given(expressions())
def test_latex_closes_what_it_opens(pair: tuple[torch.Tensor, Expr]) -> None:
    text = latex(pair[1])
    assert text.count("{") == text.count("}")
    assert text.count("\\left") == text.count("\\right")


UNARY = [f for f in FUNCTIONS if f not in ("minimum", "maximum", "where")]


@pytest.mark.parametrize("function", UNARY)
def test_functions_are_torch_s(function: str) -> None:
    positive = S.abs() + 0.1
    expr = build(function, name("s"))
    torch.testing.assert_close(evaluate(parse(expr.text), {"s": positive}, {}), FUNCTIONS[function](positive))
    assert complex(to_sympy(expr).subs(sympy.Symbol("s", real=True), 0.7)) == pytest.approx(
        complex(FUNCTIONS[function](torch.tensor(0.7, dtype=torch.float64)).item())
    )


@pytest.mark.parametrize("function", UNARY)
def test_functions_of_whole_numbers_and_of_constants(function: str) -> None:
    expected = FUNCTIONS[function](torch.arange(1, 4).to(torch.get_default_dtype()))
    got = torch.as_tensor(evaluate(build(function, name("i")), {"i": torch.arange(1, 4)}, {}))
    torch.testing.assert_close(got.to(expected.dtype), expected)
    constant = build(function, const(2))
    assert constant.op == "const"
    assert constant.args[0] == pytest.approx(FUNCTIONS[function](torch.tensor(2.0, dtype=torch.float64)).item())


def test_division_rounds_down_and_the_remainder_has_the_divisor_s_sign() -> None:
    i = torch.arange(-7, 8)
    for divisor in (3, -3, 4):
        assert evaluate(name("i") // divisor, {"i": i}, {}).tolist() == [n // divisor for n in i.tolist()]
        assert evaluate(name("i") % divisor, {"i": i}, {}).tolist() == [n % divisor for n in i.tolist()]
    assert (const(-7) // 2).text == "-4"
    assert (const(-7) % 2).text == "1"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda i, j: (i - j >= 0) & (i - j < 8), lambda i, j: (j < i + 1) & (i - 8 < j)),
        (lambda i, j: ~(j > i), lambda i, j: j <= i),
        (lambda i, j: (j <= i) & (j <= i), lambda i, j: i >= j),
        (lambda i, j: 2 * (i + j) - i <= 3, lambda i, j: i + 2 * j < 4),
        (lambda i, j: abs(i - j) <= 2, lambda i, j: (i - j <= 2) & (j - i <= 2)),
        (lambda i, j: ~((j <= i) & (j == 3)), lambda i, j: (i < j) | (j != 3)),
        (lambda i, j: i // 4 == j // 4, lambda i, j: j // 4 == i // 4),
        (lambda i, j: (j <= i) | ((j <= i) & (j == 0)), lambda i, j: j <= i),
    ],
)
def test_two_spellings_of_one_mask_are_one_text(one: Any, other: Any) -> None:
    known = {"i": name("i"), "j": name("j")}
    assert read(one, known, what="keep").text == read(other, known, what="keep").text


def test_a_predicate_that_says_everything_or_nothing_is_a_constant() -> None:
    i, j = name("i"), name("j")
    assert ((j <= i) | (j > i)).text == "True"
    assert ((j <= i) & (j > i)).text == "False"
    assert (i == i).text == "True"
    assert (name("s") == name("s")).text == "s == s"  # a score may be nan


def test_lookups_are_clamped() -> None:
    found = evaluate(parse("t0[i - j]"), VALUES, {"t0": BIAS})
    torch.testing.assert_close(found, BIAS[(I - J).clamp(0, SIZE - 1)])
    with pytest.raises(Refused, match="a table of 1 dimensions looked up with 2 indices"):
        table(BIAS)[name("i"), name("j")]


def test_parameters_are_asked_for_by_name_in_any_order() -> None:
    known = {"s": name("s"), "i": name("i"), "j": name("j")}
    assert read(lambda j, s: s + j, known, what="score").text == "j + s"
    assert read(torch.relu, known, what="score").text == "relu(s)"


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: bool(name("i") < name("j")), "write `&`, `|`, `~`"),
    (lambda: list(name("i")), "cannot be iterated"),
    (lambda: name("i") + torch.ones(2), "Tensor"),
    (lambda: torch.erf(name("s")), "operator 'erf' in an expression"),  # type: ignore[arg-type]
    (lambda: torch.nn.functional.elu(name("s"), alpha=2.0), "elu with alpha=2.0"),  # type: ignore[arg-type]
    (lambda: read(lambda q: q, {"i": name("i")}, what="keep"), "keep asks for q: its parameters can be i"),
    (lambda: parse("i +"), "not an expression"),
    (lambda: parse("__import__('os')"), "__import__"),
    (lambda: parse("i.real"), "`i.real`"),
    (lambda: parse("i < j < 3"), "`i < j < 3`"),
    (lambda: evaluate(parse("i + x"), {"i": I}, {}), "`x` is not known here"),
]


@pytest.mark.parametrize(("wrong", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_what_cannot_be_said_is_refused_by_name(wrong: Callable[[], Any], says: str) -> None:
    with pytest.raises(Refused) as caught:
        wrong()
    assert says in str(caught.value)


@pytest.mark.parametrize("value", [math.inf, -math.inf, 0.1, -2.5, 1e-7, 3, -3, True])
def test_constants_survive_their_text(value: float) -> None:
    expr = build("where", name("i") <= name("j"), name("s"), const(value))
    assert parse(expr.text).text == expr.text
    assert parse(expr.text).args[2].args[0] == value


def test_whole_numbers_stay_whole_where_their_function_does() -> None:
    assert [parse(text).text for text in ("abs(-3)", "minimum(2, 5)", "maximum(2, 5)", "sqrt(4)")] == [
        "3",
        "2",
        "5",
        "2.0",
    ]


def test_nothing_of_a_reading_outlives_it() -> None:
    """Its parts are as large as the scores: they go with it, not when Python next looks for cycles."""
    s = S.clone()
    gone, was = weakref.ref(s), gc.isenabled()
    gc.disable()
    try:
        evaluate(parse("where(j <= i, tanh(s), s)"), {**VALUES, "s": s}, {})
        del s
        assert gone() is None
    finally:
        if was:
            gc.enable()
