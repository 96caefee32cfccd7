"""Generated Triton as text and as machine code: golden sources, files that processes cannot tear, targets not there.

python tests/test_triton_sources.py       writes the golden files anew
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import at_once

from reattend.codegen.triton import module
from reattend.codegen.triton.ahead import TARGETS
from reattend.codegen.triton.attend import Attend
from reattend.codegen.triton.attend_gradient import Gradient
from reattend.codegen.triton.skeleton import pruned, text_of
from reattend.compiler.primitives.attend_spec import AttendSpec
from reattend.compiler.refusal import Refused

HERE = Path(__file__).resolve().parent
OTHER_TARGETS = ("cuda:80", "cuda:100", "hip:gfx942")
WINDOW = AttendSpec(score="s * 0.125", keep="(j <= i) & ((i <= j + 255) | (j <= 3))", outputs=("o", "lse")).text
SLOPES = AttendSpec(score="tanh(s * 0.125) * 30.0 + t0[h] * (j - i)", keep="j <= i").text
STICK = AttendSpec(score="s * 0.125", keep="j <= i", normaliser="stick").text


def golden() -> dict[str, str]:
    kernels = {
        "window_packed": Attend(WINDOW, packed=True, lazily=True).source,
        "stick": Attend(STICK).source,
        "slopes_gradient": Gradient(Attend(SLOPES, "f1"), (0,)).source,
        "slopes_gradient_keys": Gradient(Attend(SLOPES, "f1"), (0,)).source_of_keys,
    }
    return {name: text.removeprefix(text_of("functions")).lstrip() for name, text in kernels.items()}


@pytest.mark.parametrize("name", golden())
def test_the_source_is_the_golden_one(name: str) -> None:
    assert golden()[name] == (HERE / "golden" / f"{name}.triton").read_text(encoding="utf-8")


def test_no_mechanism_is_named() -> None:
    from reattend.compiler.mechanism import mechanisms

    texts = " ".join(p.read_text(encoding="utf-8").lower() for p in (HERE.parent / "codegen" / "triton").iterdir()
                     if p.suffix in (".py", ".triton"))  # fmt: skip
    words = set(texts.replace("_", " ").split())
    allowed = {"window", "linear", "agent", "cab", "combiner", "flow", "halo", "sigmoid", "softmax", "stickbreaking"}
    assert not words & (set(mechanisms()) - allowed)


def test_branches_that_are_not_settled_stay() -> None:
    lines = ["if DEEP:", "    if MASKED:", "        a = 1", "    else:", "        a = 2", "else:", "    a = 3"]
    assert pruned(lines, {"DEEP": True}) == ["if MASKED:", "    a = 1", "else:", "    a = 2"]
    assert pruned(lines, {"DEEP": False}) == ["a = 3"]
    assert pruned(["if A and not B:", "    x = 1"], {"A": True, "B": True}) == []


def test_a_torn_file_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REATTEND_CACHE", str(tmp_path))
    for number, damage in enumerate((b"", b"answer = 4", b"\xff\xfe", None)):
        source = f"answer = {42 + number}\n"
        module._load.cache_clear()
        assert module.loaded(source).answer == 42 + number
        (path,) = (p for p in (tmp_path / "triton").glob("*.py") if p.read_text() == source)
        path.unlink() if damage is None else path.write_bytes(damage)
        module._load.cache_clear()
        assert module.loaded(source).answer == 42 + number and path.read_text() == source


def test_eight_processes_write_at_once(tmp_path: Path) -> None:
    work = "from reattend.codegen.triton.module import loaded", "print(loaded('answer = 42\\n' * 2000).answer)"
    assert at_once(8, *work, cache=tmp_path) == ["42"] * 8
    assert [p.suffix for p in (tmp_path / "triton").iterdir() if p.is_file()] == [".py"]


def test_a_home_that_cannot_be_written_to_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REATTEND_CACHE", str(tmp_path / "file"))
    module._load.cache_clear()
    assert module.loaded("answer = 44\n").answer == 44


@pytest.mark.parametrize("target", ["cuda:90", *(pytest.param(t, marks=pytest.mark.slow) for t in OTHER_TARGETS)])
def test_kernels_compile_for_gpus_that_are_not_there(target: str) -> None:
    """As the stored table says, or better: `benchmarks/triton_table.py --check` on a few of its rows."""
    command = [sys.executable, str(HERE.parent / "benchmarks" / "triton_table.py"), "--check"]
    command += ["--cases", "window and sinks", "--dims", "64", "--targets", target]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("matrix instructions") in (0, 4), done.stdout  # 0: no table for this version of Triton


def test_what_is_stored_of_compiled_kernels_is_within_bounds() -> None:
    """No kernel spills; all fit and multiply with matrix units."""
    stored = json.loads((HERE.parent / "docs" / "triton_kernels.json").read_text())
    assert stored
    for row in (row for rows in stored.values() for row in rows):
        assert row["spilled"] == 0, row
        assert row["shared"] <= TARGETS[row["target"]].shared, row
        assert row["matrix"] or row["narrow"] or row["kernel"] in ("join", "merge", "rounded"), row


def test_a_target_that_is_not_known_is_refused() -> None:
    from reattend.codegen.triton.ahead import device

    with pytest.raises(Refused, match=r"target 'cuda:91'.*cuda:90"):
        device("cuda:91")


if __name__ == "__main__":
    for file, text in golden().items():
        (HERE / "golden" / f"{file}.triton").write_text(text, encoding="utf-8")
