"""`reattend recover`: learns from the lines of a file and saves; killed in the middle, it ends at the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from reattend.cli import app

RECIPE = """version: 1
sites: [{match: '*', attention: linear}]
recover: {train: lora, steps: 4, rank: 2, batch: 4}
"""
MODEL = """import torch
from small_models import words
def make():
    return words(), {"input_ids": torch.ones(2, 12, dtype=torch.long)}
"""


def prepared(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "recovered_words.py").write_text(MODEL)
    drawn = torch.randint(1, 60, (20, 12), generator=torch.Generator().manual_seed(0)).tolist()
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"input_ids": row}) for row in drawn))


def arguments(folder: Path, *more: str) -> list[str]:
    asked = ["recover", "py:recovered_words:make", str(folder / "recipe.yaml"), "--data", str(folder / "rows.jsonl")]
    return [*asked, "--save", str(folder / "saved"), *more]


def test_a_model_is_recovered_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    result = CliRunner().invoke(app, arguments(tmp_path, "--json"))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["steps"] == 4 and found["after"]["kl"] <= found["before"]["kl"]
    assert (tmp_path / "saved" / "reattend.json").is_file()
    refused = CliRunner().invoke(app, arguments(tmp_path, "--train", "new"))
    assert refused.exit_code == 1 and "nothing to train" in refused.output


@pytest.mark.slow
def test_a_killed_command_ends_at_the_same_bits(tmp_path: Path) -> None:
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    saved = []
    for name, kills in (("whole", 0), ("killed", 2)):
        folder = tmp_path / name
        folder.mkdir()
        prepared(folder)
        (tmp_path / "recovered_words.py").write_text(MODEL)
        more = ("--steps", "200", "--lr", "0.003", "--folder", str(folder / "run"))
        command = [sys.executable, "-m", "reattend", *arguments(folder, *more)]
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        log = folder / "run" / "log.jsonl"
        for number in range(kills):
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= 2 + number):
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        subprocess.run(command, env=environment, check=True, capture_output=True)
        saved.append(load_file(folder / "saved" / "model.safetensors"))
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(tensor, saved[1][name]) for name, tensor in saved[0].items())
