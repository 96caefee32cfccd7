"""A mechanism from outside the repository: a notebook cell, a script, an installed package, a scaffolded file."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from small_models import stack
from torch import Tensor, nn
from typer.testing import CliRunner

import reattend
from reattend.cli import app
from reattend.compiler.questions import QUESTIONS
from reattend.compiler.refusal import Refused
from reattend.compiler.scaffold import new_mechanism

CELL = '''
from dataclasses import dataclass
import reattend

@reattend.register("near")
@dataclass(frozen=True)
class Near(reattend.Mechanism):
    """A query sees the keys at most `reach` away."""
    reach: int = {reach}
    kind = "approximate"
    def forward(self, site, p, q, k, v):
        return reattend.attend(q, k, v, keep=lambda i, j: abs(i - j) <= self.reach, site=site)
'''
X = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
RECIPE = {"version": 1, "sites": [{"match": "*", "attention": "near"}]}


pytestmark = pytest.mark.usefixtures("notebook")


def python(*arguments: str, path: Path | None = None, folder: Path) -> subprocess.CompletedProcess[str]:
    """A fresh process that sees this checkout, and a folder more."""
    seen = [str(Path(reattend.__path__[0]).parent), *sys.path]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(([str(path)] if path else []) + [p for p in seen if p])}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=env, cwd=folder, timeout=250
    )


# --- a notebook cell --------------------------------------------------------------------------------------------------


def cell(namespace: dict[str, object], **values: int) -> None:
    exec(compile(CELL.format(**values), "<ipython-input-1>", "exec"), namespace)


def test_a_cell_defines_a_mechanism_whose_source_is_nowhere_and_defines_it_anew() -> None:
    main = ModuleType("__main__", "Automatically created module for IPython interactive environment")
    cell(main.__dict__, reach=1)
    first = reattend.mechanism("near")
    assert type(first).summary() == "A query sees the keys at most `reach` away."
    model, whole = stack(), reattend.optimize(stack(), "exact", (X,), measure=False)(X)
    one = reattend.optimize(model, RECIPE, (X,), measure=False)
    assert {row.mechanism for row in one.report.rows} == {"near(reach=1)"}
    cell(main.__dict__, reach=50)
    again = reattend.optimize(model, RECIPE, (X,), measure=False)
    assert reattend.mechanism("near") != first and reattend.mechanisms()["near"] is main.__dict__["Near"]
    assert torch.allclose(again(X), whole, atol=1e-5) and not torch.allclose(one(X), whole, atol=1e-3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (CELL.replace("@dataclass(frozen=True)\n", ""), r"Near is no dataclass: @register\('name'\) above"),
        (CELL.replace("(reattend.Mechanism)", ""), "Near is no Mechanism"),
        (CELL.replace('register("near")', "register"), "register: name <class"),
        (CELL.replace('"near"', '"keep"'), "register: name 'keep'"),
        (CELL.replace('"approximate"', '"fast"'), "near: part 'core', kind 'fast'"),
        (
            CELL.replace("(self, site, p, q", "(self, site, q"),
            r"near: forward\(self, site, q, k, v\): forward\(self, site, p",
        ),
        (
            CELL.replace("kind =", "honours = frozenset(['paddding']); kind ="),
            "near: honours 'paddding': did you mean 'padding'?",
        ),
    ],
)
def test_a_cell_that_forgets_something_is_told_what(text: str, says: str) -> None:
    with pytest.raises(Refused, match=says):
        exec(text.format(reach=1), {"__name__": "__main__"})


@pytest.mark.usefixtures("notebook")
def test_a_tensor_in_the_place_of_its_declaration_is_named() -> None:
    class Warm(reattend.Mechanism):
        def params(self, site):  # type: ignore[no-untyped-def]
            return {"gain": torch.ones(site.heads)}

        def forward(self, site, p, q, k, v):  # type: ignore[no-untyped-def]
            return q * p.gain[:, None, None]

    reattend.register("warm")(dataclass(frozen=True)(Warm))
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(Refused, match="gain is a Tensor: reattend.Param"):
        reattend.attention(q, q, q, "warm")


# --- a script ---------------------------------------------------------------------------------------------------------


def test_a_script_defines_and_uses_its_own(tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text(
        CELL.format(reach=50)
        + """
import torch
if __name__ == "__main__":
    q = torch.randn(1, 2, 5, 4)
    same = reattend.attention(q, q, q, "near", causal=True) - reattend.attention(q, q, q, "softmax", causal=True)
    print(float(same.abs().max()) < 1e-6, Near.summary())
"""
    )
    done = python("mine.py", folder=tmp_path)
    assert done.stdout.strip() == "True A query sees the keys at most `reach` away.", done.stderr


# --- a package --------------------------------------------------------------------------------------------------------


def package(folder: Path, entries: dict[str, str], **modules: str) -> None:
    """An installed distribution: modules and the metadata that pip would write."""
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    info = folder / "near_attention-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: near-attention\nVersion: 1.2\n")
    lines = "".join(f"{name} = {value}\n" for name, value in entries.items())
    (info / "entry_points.txt").write_text(f"[reattend.mechanisms]\n{lines}")


def test_a_package_is_loaded_when_its_mechanism_is_asked_for(tmp_path: Path) -> None:
    package(tmp_path, {"near": "near_plugin:Near"}, near_plugin=CELL.format(reach=2))
    done = python("-c", """
import sys, reattend
print("near_plugin" in sys.modules)
print(reattend.mechanism("softmax"), "near_plugin" in sys.modules)
print(reattend.mechanism("near"), "near" in reattend.mechanisms())
""", path=tmp_path, folder=tmp_path)  # fmt: skip
    assert done.stdout.splitlines() == ["False", "Softmax() False", "Near(reach=2) True"], done.stderr
    assert done.stderr == ""


def test_a_broken_package_is_one_warning_and_takes_no_name(tmp_path: Path) -> None:
    package(
        tmp_path,
        {"broken": "broken_plugin", "idle": "idle_plugin", "near": "bare_plugin:Near", "taken": "rude_plugin"},
        broken_plugin="import not_there",
        idle_plugin="",
        bare_plugin=CELL.format(reach=3).replace('@reattend.register("near")\n', ""),
        rude_plugin=CELL.format(reach=4).replace('"near"', '"softmax"')
        + 'reattend.register("taken")(type("T", (Near,), {}))',
    )
    done = python("-c", """
import reattend
print(sorted({"broken", "idle", "near", "taken"} & set(reattend.mechanisms())))
print(reattend.mechanisms()["softmax"].__module__, len(reattend.mechanisms()) > 9)
try:
    reattend.mechanism("broken")
except reattend.Refused as refused:
    print(refused)
""", path=tmp_path, folder=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    names, softmax, refused = done.stdout.splitlines()
    assert names == "['near', 'taken']", done.stderr  # one that is not decorated gets the name it is announced by
    assert softmax == "reattend.passes.score.softmax True"
    assert refused == "mechanism 'broken': its package fails: ModuleNotFoundError: No module named 'not_there'"
    assert done.stderr.splitlines() == [
        "mechanism 'broken' of near-attention 1.2 is left out: ModuleNotFoundError: No module named 'not_there'",
        "mechanism 'idle' of near-attention 1.2 is left out: LookupError: idle_plugin registers no 'idle'",
        "near-attention 1.2 registers 'softmax', which is there already: the first one stays",
    ]


# --- a scaffold -------------------------------------------------------------------------------------------------------


def test_a_scaffold_passes_the_check_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = CliRunner().invoke(app, ["new-mechanism", "near_by"])
    assert made.exit_code == 0 and made.stdout.splitlines()[-1] == "next: reattend check near_by.py"
    few = [question for question in QUESTIONS if question.name in ("limits", "causal", "heads", "honours", "text")]
    monkeypatch.setattr("reattend.compiler.check.QUESTIONS", few)  # all of them are asked in the slow test
    asked = CliRunner().invoke(app, ["check", "near_by.py"])
    assert asked.exit_code == 0, asked.stdout
    assert "NearBy(reach=3)" in asked.stdout and asked.stdout.endswith("all questions hold\n")


@pytest.mark.slow
def test_a_scaffold_answers_every_question(tmp_path: Path) -> None:
    (path,) = new_mechanism("near_by", folder=tmp_path)
    done = python("-m", "reattend", "check", str(path), folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_scaffold_in_the_repository_touches_its_file_and_one_line(tmp_path: Path) -> None:
    for family in ("score", "sparse"):
        (tmp_path / "passes" / family).mkdir(parents=True)
        (tmp_path / "passes" / family / "__init__.py").write_text('"""A family."""\n')
    page = tmp_path / "passes" / "__init__.py"
    page.write_text('"""Passes."""\n\nfrom .score import softmax as softmax\nfrom .sparse import window as window\n')
    made = new_mechanism("near_by", family="sparse", folder=tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in made] == [
        "passes/sparse/near_by.py",
        "passes/__init__.py",
    ]
    assert page.read_text().splitlines()[2:] == [
        "from .score import softmax as softmax",
        "from .sparse import near_by as near_by",
        "from .sparse import window as window",
    ]
    text = made[0].read_text()
    assert "from ...compiler.mechanism import Limit" in text and "from reattend" not in text
    formatted = [sys.executable, "-m", "ruff", "format", "--check", "--line-length", "120", str(made[0])]
    assert subprocess.run(formatted, capture_output=True, check=False).returncode == 0


def test_a_scaffold_overwrites_nothing(tmp_path: Path) -> None:
    new_mechanism("near_by", folder=tmp_path)
    for name, says in {
        "near_by": "exists",
        "window": "is registered",
        "Near": "small letters",
        "keep": "small letters",
    }.items():
        with pytest.raises(Refused, match=says):
            new_mechanism(name, folder=tmp_path)
    with pytest.raises(Refused, match="root of reattend's repository"):
        new_mechanism("near_far", family="sparse", folder=tmp_path)
    (tmp_path / "passes").mkdir()
    (tmp_path / "passes" / "__init__.py").write_text("")
    with pytest.raises(Refused, match="family 'sparse'"):
        new_mechanism("near_far", family="sparse", folder=tmp_path)


# --- one that does not fit --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Added(reattend.Mechanism):
    """Each row gets its own value, of which there must be as many."""

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reattend.attend(q, k, v, site=site) + v


class MemoryInFront(nn.Module):
    """Three more keys than queries."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Parameter(torch.randn(1, 2, 3, 8))

    def forward(self, x: Tensor) -> Tensor:  # (B, N, 16)
        q = x.unflatten(2, (2, 8)).transpose(1, 2)
        k = torch.cat((self.memory.expand(x.shape[0], -1, -1, -1), q), 2)
        return nn.functional.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)


def test_a_mechanism_that_fails_at_a_sites_sizes_is_refused_there() -> None:
    reattend.register("added")(Added)
    with pytest.raises(Refused, match="added: its forward fails at this site's sizes: The size of tensor"):
        reattend.optimize(MemoryInFront().eval(), "added", torch.randn(2, 9, 16), measure=False)
