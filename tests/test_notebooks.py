"""Every notebook runs from top to bottom, what it shows last has a page, and it is committed without outputs."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

import reattend

EXAMPLES = Path(reattend.__path__[0]) / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
FAST = ("06_reading_a_cascade",)

pytestmark = pytest.mark.usefixtures("notebook")


def cells(path: Path, kind: str) -> list[str]:
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def run(path: Path) -> list[Any]:
    """What its cells show: each one's last expression, as a notebook does it."""
    space: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    for number, source in enumerate(cells(path, "code")):
        tree = ast.parse(source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{path.stem}[{number}]", "exec", dont_inherit=True), space)
        if last is not None:
            shown.append(
                eval(compile(ast.Expression(last.value), f"{path.stem}[{number}]", "eval", dont_inherit=True), space)
            )
    return [value for value in shown if value is not None]


# peft asks transformers a question under an older name
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=() if p.stem in FAST else pytest.mark.slow) for p in NOTEBOOKS]
)
def test_it_runs_and_what_it_shows_has_a_page(path: Path) -> None:
    for value in run(path):
        assert value._repr_html_().startswith("<")


def test_they_are_numbered_and_committed_without_outputs() -> None:
    assert [int(path.name[:2]) for path in NOTEBOOKS] == list(range(1, len(NOTEBOOKS) + 1))
    for path in NOTEBOOKS:
        book = json.loads(path.read_text(encoding="utf-8"))
        assert all(not c["outputs"] and c["execution_count"] is None for c in book["cells"] if c["cell_type"] == "code")
        assert cells(path, "markdown")[0].startswith("# ")
