"""Every example runs and prints what it promises; what a user must write stays short."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import reattend

EXAMPLES = Path(reattend.__path__[0]) / "examples"
FIRST_HOURS = sorted(path.stem for path in EXAMPLES.glob("first_hour_*.py"))


pytestmark = pytest.mark.usefixtures("notebook")


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


@pytest.mark.skipif(importlib.util.find_spec("torchvision_first") is None, reason="not the environment of make setup")
def test_ones_own_script_may_import_transformers_first(tmp_path: Path) -> None:
    said = "from transformers import LlamaForCausalLM; import timm, reattend; print(LlamaForCausalLM.__name__)"
    done = subprocess.run([sys.executable, "-c", said], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "LlamaForCausalLM\n", done.stderr


def test_the_page_on_ones_own_mechanism_runs() -> None:
    page = EXAMPLES.parent / "docs" / "own_mechanism.md"
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    found = doctest.testfile(str(page), module_relative=False, optionflags=flags, encoding="utf-8")
    assert found.failed == 0 and found.attempted > 10
