"""What benchmarks/gpu.py asks kernels before it times them: its cases, its check of numbers, its peers."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton_interpreter  # noqa: F401 (kernels run in Python)

from reattend.benchmarks import gpu
from reattend.benchmarks.gpu_cases import FORMATS, Case, Sizes, cases, layer, one_token
from reattend.codegen.cpu.toolchain import toolchain

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:overflow:RuntimeWarning",
                                        "ignore:invalid value:RuntimeWarning")  # fmt: skip
ROOT = Path(__file__).resolve().parent.parent
FEW = Sizes(1, 2, 70, 16, "cpu")
LAYERS = [layer(*each) for each in FORMATS]


@pytest.mark.parametrize("case", [*cases(), one_token(), *LAYERS], ids=lambda case: case.name)
def test_numbers_are_right(case: Case) -> None:
    sizes = Sizes(1, 1, 9, 256, "cpu") if case in LAYERS else FEW
    assert gpu.check(case, sizes) == ""


def test_wrong_numbers_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases()[0]
    ours = gpu.kernel(case.call(FEW))
    wrong = replace(ours, run=lambda groups, text: [t * 1.1 for t in ours.run(groups, text)])
    monkeypatch.setattr(gpu, "kernel", lambda call: wrong)
    assert "o is" in gpu.check(case, FEW)
    monkeypatch.setattr(gpu, "kernel", lambda call: replace(ours, refuses=lambda groups, text: "too old"))
    assert gpu.check(case, FEW) == "refused: too old"


@pytest.mark.skipif(toolchain() is None, reason="no C++ compiler on this machine")
@pytest.mark.filterwarnings("ignore:Dynamo detected:UserWarning")
def test_peers_compute_the_same() -> None:
    """Those that run here: torch's attention, and merge's meaning compiled."""
    named = {case.name: case for case in [*cases(), one_token()]}
    for name in ("causal", "full", "one token", "merge of 8 parts"):
        call = named[name].call(FEW)
        others = {who: run for who, run in named[name].others(call).items() if who in ("sdpa", "compiled torch")}
        same, reasons = gpu.agreeing(others, gpu.kernel(call).run(call.groups, call.text)[0])
        assert same.keys() == others.keys() and others and not reasons, reasons


def test_peers_that_fail_or_differ_have_no_time() -> None:
    def fails() -> torch.Tensor:
        raise ValueError("heads\nof 3")

    same, reasons = gpu.agreeing({"broken": fails, "other": lambda: torch.zeros(3)}, torch.ones(3))
    assert not same and reasons == {"broken": "ValueError: heads", "other": "1 apart"}


def test_without_a_gpu_it_says_what_to_do() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    ran = subprocess.run([sys.executable, ROOT / "benchmarks" / "gpu.py"], capture_output=True, text=True)
    assert ran.returncode == 1 and "triton_table.py" in ran.stderr
