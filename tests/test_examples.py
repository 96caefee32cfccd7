"""Every example runs and prints what it promises; what a user must write stays short."""

from __future__ import annotations

import ast
import doctest
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import reattend
from reattend.compiler import mechanism as registry

EXAMPLES = Path(reattend.__path__[0]) / "examples"
FIRST_HOURS = sorted(path.stem for path in EXAMPLES.glob("first_hour_*.py"))


@pytest.fixture(autouse=True)
def notebook() -> Iterator[None]:
    before = dict(registry._REGISTRY)
    yield
    registry._REGISTRY.clear()
    registry._REGISTRY.update(before)


def example(name: str) -> dict[str, Any]:
    """What the script defines."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=name)


SAYS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "first_hour_llama": ({}, ("2 of 2 sites rewritten", "its cache holds 35 keys")),
    "first_hour_vit": ({}, ("UNTRAINED", "step 5: loss", "new tensors")),
    "first_hour_mechanism": ({"everything": False}, ("torch.Size([2, 10, 64])", "'reattend:alibi_like?slope=0.1'",
                                                     "1 of 2 sites rewritten")),
}  # fmt: skip


def test_every_first_hour_is_run() -> None:
    assert sorted(SAYS) == FIRST_HOURS


@pytest.mark.parametrize("name", FIRST_HOURS)
def test_it_prints_what_it_promises(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    options, says = SAYS[name]
    example(name)["main"](**options)
    shown = capsys.readouterr().out
    assert [text for text in says if text not in shown] == [], shown


@pytest.mark.parametrize("name", FIRST_HOURS)
def test_it_is_short(name: str) -> None:
    """Statements in main that are not printing: what a user types."""
    tree = ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    typed = [
        n
        for n in ast.walk(main)
        if isinstance(n, ast.stmt) and n is not main and not ast.unparse(n).startswith("print(")
    ]
    assert len(typed) < 15


def test_the_page_on_ones_own_mechanism_runs() -> None:
    page = EXAMPLES.parent / "docs" / "own_mechanism.md"
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    found = doctest.testfile(str(page), module_relative=False, optionflags=flags, encoding="utf-8")
    assert found.failed == 0 and found.attempted > 10
