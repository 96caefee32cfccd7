"""Every example in a docstring runs, module by module, found by import name as a user would import it."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import reattend

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
FLOORS = ("api", "cli", "compiler", "passes", "codegen", "models")


def modules() -> list[str]:
    """By folder, without importing anything: a module that fails to import is one failing test, not none."""
    names = ["reattend"]
    for info in pkgutil.iter_modules(reattend.__path__, "reattend."):
        if info.name.split(".")[1] in FLOORS:
            names += [info.name, *_inside(info.name)]
    return names


def _inside(package: str) -> list[str]:
    folder = [f"{reattend.__path__[0]}/{'/'.join(package.split('.')[1:])}"]
    found = [(info.name, info.ispkg) for info in pkgutil.iter_modules(folder, f"{package}.")]
    return [name for module, nested in found for name in (module, *(_inside(module) if nested else []))]


@pytest.mark.parametrize("name", modules())
def test_examples_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name), optionflags=FLAGS).failed == 0


def test_modules_are_found_in_depth() -> None:
    assert {"reattend", "reattend.compiler.refusal", "reattend.compiler.primitives", "reattend.passes.linear"} <= set(
        modules()
    )
