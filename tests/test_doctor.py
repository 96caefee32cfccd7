"""The doctor finds what is here, names the command for what is not, and does not raise on a poor machine."""

from __future__ import annotations

import dataclasses
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch

import reattend
from reattend.compiler import doctor as examined
from reattend.compiler.doctor import EXTRAS, Check, doctor

PYPROJECT = tomllib.loads((Path(reattend.__file__).resolve().parent / "pyproject.toml").read_text())


def by_name() -> dict[str, Check]:
    return {check.name: check for check in doctor()}


def test_finds_what_runs_this_test() -> None:
    checks = by_name()
    assert checks["python"].state == checks["torch"].state == "ok"
    assert checks["torch"].found.startswith(torch.__version__.partition("+")[0])  # its build stands behind
    assert all(check.purpose and check.found for check in checks.values())


def test_every_extra_is_asked_for_and_is_in_pyproject() -> None:
    declared = PYPROJECT["project"]["optional-dependencies"]
    assert list(EXTRAS) == [name.removeprefix("extra ") for name in by_name() if name.startswith("extra ")]
    assert set(EXTRAS) == set(declared)
    for name, extra in EXTRAS.items():
        asked = {row.split(">=")[0] for row in declared[name]}
        assert set(extra.packages) - {"torchvision"} <= asked, name  # timm brings torchvision along


def test_a_machine_with_nothing_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", nothing)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    checks = by_name()
    assert checks["torch"] == dataclasses.replace(
        checks["torch"], state="wrong", found="not installed", remedy="pip install 'torch>=2.11'"
    )
    assert checks["C compiler"].state == "absent"
    assert checks["extra hf"].remedy == "pip install 'reattend[hf]'"
    assert {check.state for name, check in checks.items() if name.startswith("extra ")} == {"absent"}


def test_an_old_torch_is_wrong_and_a_preview_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = iter(["2.10.1+cpu", "2.12.0a0+git1234"])
    monkeypatch.setattr(metadata, "version", lambda package: next(versions))
    assert [examined._torch().state, examined._torch().state] == ["wrong", "ok"]


def test_cpu_flags_of_both_families(tmp_path: Path) -> None:
    intel, arm = tmp_path / "intel", tmp_path / "arm"
    intel.write_text("processor\t: 0\nflags\t\t: fpu avx2 amx_bf16\nprocessor\t: 1\nflags\t\t: fpu\n")
    arm.write_text("processor\t: 0\nFeatures\t: fp asimd sve\n")
    assert examined.cpu_flags(intel) == {"fpu", "avx2", "amx_bf16"}
    assert examined.cpu_flags(arm) == {"fp", "asimd", "sve"}
    assert examined.cpu_flags(tmp_path / "none") == frozenset()


def test_a_compiler_that_does_not_run_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = tmp_path / "c++"
    stub.write_text("#!/bin/sh\nexit 1\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", str(stub))
    monkeypatch.delenv("CC", raising=False)
    assert examined._compiler().state == "absent"
    stub.write_text("#!/bin/sh\necho a compiler 1.0\n")
    assert examined._compiler().found == f"a compiler 1.0 at {stub}"
