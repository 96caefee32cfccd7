"""Functions that say the same are read once, and only those: texts and tables are what a fresh reading gives."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import reattend
from reattend.compiler.primitives import tables as front
from reattend.compiler.symbol_same import sameness
from reattend.compiler.symbols import Table, name, table

NAMES = {n: name(n) for n in ("s", "h", "i", "j")}
REACH = 4


def text(function: Callable[..., Any], tables: front.Tables | None = None) -> str:
    return (tables or front.Tables()).text(function, NAMES, "score")


def same(one: Any, other: Any) -> bool:
    keys = [sameness(each, []) for each in (one, other)]
    return None not in keys and keys[0] == keys[1]


def within(reach: Any) -> Callable[..., Any]:
    return lambda i, j: i - j < reach


@dataclass(frozen=True)
class Near:
    reach: int

    def keep(self, i: Any, j: Any) -> Any:
        return abs(i - j) <= self.reach

    def inside(self) -> Callable[..., Any]:
        return lambda i, j: self.keep(i, j)


@pytest.mark.parametrize("value", [4, 4.5, True, "a", None, (1, (2.0, "b")), torch.float32, math, torch.relu])
def test_equal_things_from_outside_are_the_same(value: Any) -> None:
    assert same(within(value), within(value))


def test_what_differs_is_told_apart() -> None:
    pairs = [(1, True), (1, 1.0), (0.0, -0.0), (4, 5), ((1,), (2,)), (Near(1), Near(2))]
    assert not any(same(within(one), within(other)) for one, other in pairs)
    assert not same(lambda i, j: i < j, lambda i, j: i <= j)
    assert not same(lambda i, j, w=3: i - j < w, lambda i, j, w=4: i - j < w)
    assert same(Near(3).inside(), Near(3).inside()) and same(Near(3).keep, Near(3).keep)
    assert not same(Near(3).inside(), Near(4).inside()) and not same(Near(3).keep, Near(4).keep)


class Mutable:
    reach = 3


UNKNOWN = {
    "a list": within([3]),
    "an object": within(Mutable()),
    "a tensor": within(torch.ones(3)),
    "a module of someone": lambda i, j: i - j < random.randint(1, 9),
    "torch's random numbers": lambda s: s + torch.rand(()).item(),
    "a tensor made inside": lambda s, i: s + table(torch.arange(3))[i],
    "a partial": functools.partial(lambda i, j, w: i - j < w, w=3),
    "itself": lambda i, j: UNKNOWN["itself"] is None,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_could_change_has_no_key(name: str) -> None:
    assert sameness(UNKNOWN[name], []) is None


def test_a_global_is_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = lambda i, j: i - j < REACH
    first = text(keep)
    monkeypatch.setitem(globals(), "REACH", 9)
    assert first == "i <= j + 3" and text(keep) == "i <= j + 8"


def test_a_cell_is_read_anew() -> None:
    reach = 4
    keep = lambda i, j: i - j < reach
    first, reach = text(keep), 9
    assert first == "i <= j + 3" and text(keep) == "i <= j + 8"


def two(a: Table, b: Table) -> Callable[..., Any]:
    return lambda s, h, i, j: s * b[h] + a[i - j] + b[h] * j


def test_tables_are_named_as_a_fresh_reading_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order, met before or not, one tensor behind two tables, and with other dimensions."""
    x, y, z = (torch.randn(5) for _ in range(3))
    given = [((x, y), ()), ((y, x), ()), ((x, y), (y,)), ((x, y), (z, x)), ((x, x), ()), ((x, y), (x, y)), ((x, y), ())]
    for _ in range(2):
        for (a, b), before in given:
            kept, fresh = front.Tables(before), front.Tables(before)
            found = text(two(table(a), table(b)), kept)
            with monkeypatch.context() as patch:
                patch.setattr(front, "sameness", lambda function, live: None)
                assert text(two(table(a), table(b)), fresh) == found
            assert [id(t) for t in kept.tensors] == [id(t) for t in fresh.tensors]
    with pytest.raises(reattend.Refused, match="2 dimensions"):
        text(two(table(torch.ones(2, 2)), table(y)))


def test_mistakes_are_said_each_time() -> None:
    for _ in range(2):
        with pytest.raises(reattend.Refused, match="keeps no key"):
            reattend.attend(*torch.randn(3, 1, 1, 4, 8), keep=lambda i: i < i)
        with pytest.raises(reattend.Refused, match="asks for z"):
            reattend.attend(*torch.randn(3, 1, 1, 4, 8), keep=lambda z: z < 3)


def test_a_function_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read, seen = front.read, []
    monkeypatch.setattr(front, "read", lambda *given, **how: seen.append(how["what"]) or read(*given, **how))
    q = torch.randn(1, 2, 6, 8)
    slopes = torch.tensor([0.7, 0.3])
    results = []
    for reach in (3, 3, 2, 3):
        results.append(reattend.attend(q, q, q, causal=True, keep=lambda i, j: i - j < reach,  # noqa: B023
                                       score=lambda s, h, i, j: s + table(slopes)[h] * (j - i), weight=torch.relu,
                                       normaliser="none"))  # fmt: skip
    assert seen.count("keep") == 2 and seen.count("score") == 4 and seen.count("weight") == 1
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[3])
    assert not torch.equal(results[0], results[2])


def test_compiled_calls_are_as_before() -> None:
    q = torch.randn(1, 2, 6, 8)

    def call(q: torch.Tensor) -> torch.Tensor:
        return reattend.attend(q, q, q, keep=lambda i, j: i - j < 3)  # type: ignore[no-any-return]

    assert torch.equal(torch.compile(call, fullgraph=True, backend="eager")(q), call(q))
