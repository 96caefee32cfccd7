"""What a machine can see of the house style: files open with their one idea, names speak, nothing is left open."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

import reattend

ROOT = Path(reattend.__file__).resolve().parent
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
FILES = [name for name in TRACKED if (ROOT / name).is_file()]
SOURCES = [name for name in FILES if name.endswith(".py")]
EMPTY_NAMES = {"util", "utils", "helper", "helpers", "misc", "common", "manager", "base"}
# written in halves so that this file does not find itself
OPEN_ENDS = re.compile("TO" + "DO|FIX" + "ME|XX" + "X|NotImplemented" + "Error|mark\\.(skip|xfail)\\b(?!if)")
ONE_MACHINE = re.compile(r"/(work|farm|root|home|tmp)/[a-z]")


@pytest.mark.parametrize("name", SOURCES)
def test_first_line_is_a_sentence(name: str) -> None:
    text = (ROOT / name).read_text()
    lines = text.removeprefix("#!/usr/bin/env python3\n").splitlines()
    first = (ast.get_docstring(ast.parse(text)) or "").splitlines()[:1]
    assert first, "no docstring"
    assert lines[0].startswith('"""' + first[0][:20]), "the docstring opens the file, on its first line"
    assert first[0].rstrip().endswith((".", "?", "!", ":", ",", ";", ")")) or len(first[0]) > 60, first[0]


@pytest.mark.parametrize("name", SOURCES)
def test_short_enough_to_be_one_idea(name: str) -> None:
    assert len((ROOT / name).read_text().splitlines()) <= 500


def test_names_say_something() -> None:
    assert [name for name in SOURCES if Path(name).stem in EMPTY_NAMES] == []


def test_test_files_have_unique_names_and_stand_alone() -> None:
    stems = [Path(name).stem for name in SOURCES if name.startswith("tests/")]
    assert len(stems) == len(set(stems))
    assert not {"tests/__init__.py", "conftest.py"} & set(SOURCES)


def test_nothing_is_left_open() -> None:
    found = [
        f"{name}:{number}: {line.strip()}"
        for name in SOURCES
        for number, line in enumerate((ROOT / name).read_text().splitlines(), 1)
        if OPEN_ENDS.search(line)
    ]
    assert found == []


def test_no_path_of_one_machine() -> None:
    texts = [
        name for name in FILES if name.endswith((".py", ".md", ".toml", ".yaml", ".txt", ".json")) or "." not in name
    ]
    assert [name for name in texts if ONE_MACHINE.search((ROOT / name).read_text(errors="replace"))] == []


def test_nothing_built_is_tracked() -> None:
    built = re.compile(r"(^|/)(build|dist|\.venv|__pycache__)/|\.(whl|so|pyc|egg-info)(/|$)")
    assert [name for name in FILES if built.search(name)] == []
