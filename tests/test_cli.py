"""The command line: the same answers as the Python face, exit codes, JSON also where it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from reattend.cli import app
from reattend.compiler.mechanism import mechanisms


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_sites_of_a_built_in_model() -> None:
    result = run("sites", "nanogpt")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("2 sites")
    found = json.loads(run("sites", "nanogpt", "--json").stdout)
    assert [s["pattern"] for s in found["sites"]] == ["causal-self", "causal-self"]


def test_optimize_writes_report_and_graph(tmp_path: Path) -> None:
    page, facts, graph = tmp_path / "report.html", tmp_path / "report.json", tmp_path / "graph.py"
    result = run("optimize", "encoder_layer", "exact", "--report", str(page), "--graph", str(graph))
    assert result.exit_code == 0, result.output
    assert "1 of 1 sites rewritten" in result.output
    assert page.read_text().startswith("<!doctype html>") and "def forward" in graph.read_text()
    assert run("optimize", "encoder_layer", "exact", "--report", str(facts)).exit_code == 0
    assert json.loads(facts.read_text())["rows"][0]["status"] == "rewritten"


def test_what_is_written_makes_its_folder(tmp_path: Path) -> None:
    page, graph = tmp_path / "pages" / "report.html", tmp_path / "graphs" / "of" / "exact.py"
    result = run("optimize", "encoder_layer", "exact", "--report", str(page), "--graph", str(graph))
    assert result.exit_code == 0, result.output
    assert page.is_file() and "def forward" in graph.read_text()
    table = tmp_path / "tables" / "heads.csv"
    assert run("heads", "encoder_layer", "--out", str(table)).exit_code == 0 and table.is_file()


def test_what_torchao_logs_when_it_is_imported_is_not_read_with_a_model(tmp_path: Path) -> None:
    """In a process of its own: in this one it has been imported long ago."""
    (tmp_path / "load.py").write_text(
        "import logging, sys\n"
        "from reattend.models.load import load_model\n"
        "load_model('llama')\n"
        "assert 'torchao' in sys.modules\n"
        "logging.getLogger('torchao').warning('logged afterwards')\n"
    )
    done = subprocess.run([sys.executable, str(tmp_path / "load.py")], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and done.stderr == "logged afterwards\n", done.stderr


def test_a_rewritten_model_is_written_and_says_how_it_ships(tmp_path: Path) -> None:
    result = run("optimize", "encoder_layer", "exact", "--save", str(tmp_path / "saved"))
    assert result.exit_code == 0 and f"wrote {tmp_path / 'saved'}" in result.output
    assert (tmp_path / "saved" / "reattend.json").is_file()
    routes = json.loads(run("ships", "encoder_layer", "exact", "--json").stdout)
    assert routes["save_pretrained/load"] == "yes" and routes["hf"] != "yes"
    assert "generate" in run("ships", "encoder_layer", "exact").output


def test_a_model_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def make():\n"
        "    return torch.nn.TransformerEncoderLayer(16, 2, batch_first=True), (torch.randn(2, 5, 16),)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert run("sites", "py:mine:make").output.startswith("1 sites")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("sites", "no_such_model"), "model 'no_such_model'"),
        (("optimize", "nanogpt", "no_such_recipe"), "no_such_recipe"),
        (("mechanisms", "--for", "nanogpt"), "MODEL@SITE"),
        (("check", "windw"), "did you mean 'window'"),
        (("sites", "py:no_such_module:make"), "no_such_module"),
        (("kernels", "no_such_model", "exact", "--target", "cuda:91"), "did you mean 'cuda:90'"),  # before it is loaded
        (("build", "no_such_model", "exact", "--target", "cpu"), "target 'cpu': known: cuda:100"),
        (("report", "no_such_model", "exact", "--target", "gpu"), "target 'gpu': known: cuda:100"),
    ],
)
def test_a_fault_of_the_user_is_one_line_and_exit_code_1(arguments: tuple[str, ...], says: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    said = result.stderr.strip()
    assert says in said and said.startswith("error: ") and "\n" not in said
    if arguments[0] in ("sites", "optimize", "check"):
        assert says in json.loads(run(*arguments, "--json").stdout)["error"]


def test_what_fits_a_site() -> None:
    site = json.loads(run("sites", "nanogpt", "--json").stdout)["sites"][0]["path"]
    fitting = run("mechanisms", "--for", f"nanogpt@{site}").output
    assert "window" in fitting and "agent" not in fitting


def test_recipes_are_checked_listed_and_described(tmp_path: Path) -> None:
    assert "exact" in run("recipe", "list").output.split()
    assert "attention: softmax" in run("recipe", "check", "exact").output
    assert json.loads(run("recipe", "schema").output)["type"] == "object"
    bad = tmp_path / "bad.yaml"
    bad.write_text("version: 1\nsites:\n  - {match: '*', attntion: window}\n")
    result = run("recipe", "check", str(bad))
    assert result.exit_code == 1 and "bad.yaml:3" in result.stderr and "attention" in result.stderr


def test_python_dash_m_and_a_closed_pipe() -> None:
    command = f"{sys.executable} -m reattend mechanisms | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and done.stdout.startswith(next(iter(mechanisms()))) and "Traceback" not in done.stderr
