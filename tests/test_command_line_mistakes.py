"""Mistakes on the command line: one line that says what was found and what would fit, exit code 1, no traceback."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from reattend import api
from reattend.cli import app

MODULE = """
    import torch
    from torch import nn

    def needs(x): return nn.Linear(2, 2)
    def raises(): raise ValueError("my own trouble\\nand more")
    def three(): return nn.Linear(4, 4), (torch.randn(2, 4),), 3
    def text(): return nn.Linear(4, 4), "x"
    def attends(): return Attends(), (torch.randn(2, 5, 8),)
    value = 3

    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.a(x, x, x, need_weights=False)[0]
"""


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "strangers_module.py").write_text(textwrap.dedent(MODULE))
    (tmp_path / "strangers_syntax.py").write_text("def f(:\n")
    for folder, config in (("hf_empty", None), ("hf_unknown", '{"model_type": "nosuch"}'), ("hf_cut", "{")):
        (tmp_path / folder).mkdir()
        if config:
            (tmp_path / folder / "config.json").write_text(config)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    logging.getLogger().handlers.clear()


def mistake(*words: str) -> str:
    answer = CliRunner().invoke(app, list(words))
    said = answer.stderr.strip()
    assert answer.exit_code == 1, (words, said)
    assert said.startswith("error: ") and "\n" not in said
    return said


@pytest.mark.parametrize("words", [["nosuch"], ["sites"], ["sites", "mha", "--nosuch"], ["recipe", "nosuch"]], ids=str)
def test_words_that_are_no_command_are_a_mistake_of_the_caller(words: list[str]) -> None:
    answer = CliRunner().invoke(app, words)
    assert answer.exit_code == 1 and ("No such" in answer.stderr or "Missing" in answer.stderr)


@pytest.mark.parametrize(
    "words",
    [
        ["preview", "byte_lm", "window", "--tokens", "-5"],
        ["preview", "byte_lm", "window", "--batch", "0"],
        ["bench", "byte_lm", "window", "--runs", "0"],
        ["bench", "byte_lm", "window", "--length", "-1"],
        ["recover", "byte_lm", "window", "--steps", "-1"],
        ["heads", "byte_lm", "--length", "0"],
    ],
    ids=" ".join,
)
def test_numbers_that_count_nothing_are_a_mistake_of_the_caller(words: list[str]) -> None:
    answer = CliRunner().invoke(app, words)
    assert answer.exit_code == 1 and "should be greater than or equal to" in answer.stderr


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("py:strangers_module:needs", "TypeError: needs() missing 1 required positional argument: 'x'"),
        ("py:strangers_module:raises", "ValueError: my own trouble (strangers_module.py:6)"),
        ("py:strangers_module:three", "Linear, tuple, int from py:"),
        ("py:strangers_module:text", "Linear, str from py:"),
        ("py:strangers_module:value", "'int' object is not callable"),
        ("py:strangers_module:", "has no attribute ''"),
        ("py:strangers_syntax:f", "SyntaxError: invalid syntax"),
        ("py:no_such_module:f", "No module named 'no_such_module'"),
        ("hf:hf_empty", "model 'hf_empty': "),
        ("hf:hf_unknown", "nosuch"),
        ("hf:hf_cut", "not a valid JSON file"),
    ],
)
def test_models_that_cannot_be_made(model: str, says: str) -> None:
    if model.startswith("hf:"):
        pytest.importorskip("transformers")
    assert says in mistake("sites", model)


def test_places_that_cannot_be_written() -> None:
    Path("recipe.yaml").write_text("version: 1\nsites: [{match: '*', attention: {window: {window: 3}}}]\n")
    model = "py:strangers_module:attends"
    assert "--report x.pdf: .html, .json or .txt" in mistake("optimize", model, "recipe.yaml", "--report", "x.pdf")
    where = "recipe.yaml/graph.py"
    assert f"{where}: Not a directory" in mistake("optimize", model, "recipe.yaml", "--graph", where)


def test_what_is_no_mechanism() -> None:
    for what in ("strangers_module:value", "strangers_module:Attends"):
        assert "is no mechanism: a registered name, or a Mechanism's class" in mistake("check", what)


OWN = """
    from dataclasses import dataclass
    import reattend

    @reattend.register("only_near")
    @dataclass(frozen=True)
    class OnlyNear(reattend.Mechanism):
        reach: int = 3
        kind = "approximate"

        def forward(self, site, p, q, k, v):
            return reattend.attend(q, k, v, keep=lambda i, j: i - j < self.reach, site=site)
"""


@pytest.mark.usefixtures("notebook")
def test_a_mechanism_in_a_file_of_ones_own_stands_in_recipes() -> None:
    Path("only_near.py").write_text(textwrap.dedent(OWN))
    assert "only_near: no such file" in mistake("recipe", "check", "only_near")
    answer = CliRunner().invoke(app, ["--with", "only_near.py", "recipe", "check", "only_near"])
    assert answer.exit_code == 0, answer.stderr
    assert "attention: only_near" in answer.stdout


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1\ny = 1 / 0\n", "own.py:2: ZeroDivisionError: division by zero"),
        ("x = 1\ndef f(:\n", "own.py:2: SyntaxError: invalid syntax"),
        ("x = 1\n", "own.py registers no mechanism: @reattend.register('name') above"),
    ],
)
def test_files_of_ones_own_that_register_nothing(text: str, says: str) -> None:
    Path("own.py").write_text(text)
    assert says in mistake("check", "own.py")
    assert says in mistake("--with", "own.py", "recipe", "list")


def test_what_training_back_lacks_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "optimize", None)
    Path("calls.jsonl").write_text('{"input_ids": [1, 2, 3]}\n')
    assert "nope.jsonl does not exist" in mistake("recover", "llama", "window", "--data", "nope.jsonl")
    assert "no data: recover(fast, data), --data FILE" in mistake("recover", "llama", "window")
    asked = ("recover", "llama", "window", "--data", "calls.jsonl")
    assert "train='everything'" in mistake(*asked, "--train", "everything")
    assert "lr=-1.0" in mistake(*asked, "--lr", "-1")


def test_too_little_memory_is_a_mistake_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*_: object, **__: object) -> None:
        torch.empty(2**50)

    monkeypatch.setattr(api, "optimize", allocate)
    assert mistake("ships", "llama", "exact") == "error: out of memory: fewer or shorter inputs, or a smaller model"


def test_a_file_without_rows_of_quality() -> None:
    Path("rows.jsonl").write_text("no row\n")
    said = mistake("report", "py:strangers_module:attends", "exact", "--quality", "rows.jsonl")
    assert "rows.jsonl holds no row" in said


def test_a_name_that_is_nearly_a_mechanisms() -> None:
    assert "did you mean 'sigmoid'?" in mistake("recipe", "check", "sigmod")
    assert "did you mean 'window'? mechanisms and models: " in mistake("explain", "windw", "--math")


@pytest.mark.parametrize(
    ("recipe", "place", "says"),
    [
        ("version: 1\nsites:\n  - match: '*'\n    attention: {window: {window: -3}}\n", "r.yaml:4:", "window >= 1"),
        ("version: 1\nmodel: {tpye: bert}\n", "r.yaml:2:", "did you mean 'type'? facts of a model: class, heads"),
    ],
)
def test_recipes_that_could_never_hold_are_refused_where_they_are_read(recipe: str, place: str, says: str) -> None:
    Path("r.yaml").write_text(recipe)
    said = mistake("recipe", "check", "r.yaml")
    assert place in said and says in said
