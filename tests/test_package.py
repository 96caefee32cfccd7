"""The repository's root is the package: listed is what stands here, floors hold, a built wheel works elsewhere."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

import reattend

ROOT = Path(reattend.__file__).resolve().parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FLOORS = ("compiler", "passes", "codegen", "models")
# floor -> what it may not know: the floors above it and those beside it
FORBIDDEN = {
    "compiler": {"passes", "codegen", "models", "api", "cli"},
    "passes": {"codegen", "models", "api", "cli"},
    "codegen": {"passes", "models", "api", "cli"},
    "models": {"passes", "codegen", "api", "cli"},
    "api": {"cli"},
}


def sources() -> list[Path]:
    return sorted([*ROOT.glob("*.py"), *(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(["reattend", *(parts[:-1] if parts[-1] == "__init__" else parts)])


def imports(text: str, path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of everything that a source standing at `path` imports."""
    package = module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = [*base, *node.module.split(".")] if node.module else base
            yield from ((node.lineno, ".".join([*stem, alias.name])) for alias in node.names)


def test_listed_packages_are_the_folders() -> None:
    folders = {module_name(path) for path in sources() if path.name == "__init__.py"}
    assert sorted(PYPROJECT["tool"]["setuptools"]["packages"]) == sorted(folders)


def test_every_folder_with_sources_is_a_package() -> None:
    assert [path.parent for path in sources() if not (path.parent / "__init__.py").exists()] == []


def test_pins_fit_the_ranges() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in map(Requirement, lines)}
    extras = PYPROJECT["project"]["optional-dependencies"]
    rows = [row for name in extras if name not in ("notebook", "browser") for row in extras[name]]  # not pinned
    asked = [*PYPROJECT["project"]["dependencies"], *rows]
    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_floors(path: Path) -> None:
    floor = path.relative_to(ROOT).parts[0].removesuffix(".py")
    above = tuple(f"reattend.{name}." for name in FORBIDDEN.get(floor, ()))
    climbed = [(line, name) for line, name in imports(path.read_text(), path) if f"{name}.".startswith(above)]
    assert climbed == []


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_inside_the_package_imports_are_relative(path: Path) -> None:
    """`import compiler` works by accident from the root and makes a second copy, which registers operators twice."""
    beside = {*FLOORS, *(top.stem for top in ROOT.glob("*.py") if not top.stem.startswith("__"))}
    by_accident = [(line, name) for line, name in imports(path.read_text(), path) if name.split(".")[0] in beside]
    assert by_accident == []
    if path != ROOT / "__init__.py":
        named = re.findall(r"^[ \t]*(?:from|import) reattend.*", path.read_text(), re.MULTILINE)
        assert named == [], "only the root's __init__.py names the package"


def test_relative_imports_are_read_as_absolute_names() -> None:
    """The two tests above see through dots."""
    text = "from ...passes import window\nfrom ..site import Site\nfrom . import attend\nimport compiler.site\n"
    found = [name for _, name in imports(text, ROOT / "compiler" / "primitives" / "planted.py")]
    assert found == [
        "reattend.passes.window",
        "reattend.compiler.site.Site",
        "reattend.compiler.primitives.attend",
        "compiler.site",
    ]


def built_wheel(folder: Path) -> Path:
    """The wheel, built from a copy of the tree so that no build/ is left in the checkout."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file():
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "tree" / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(folder / "tree")], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_wheel_works_in_a_bare_environment_elsewhere(tmp_path: Path) -> None:
    """Installed without any way back to the checkout, with dependencies lent by this interpreter's environment."""
    wheel = built_wheel(tmp_path)
    venv.create(tmp_path / "bare", with_pip=False)
    python = tmp_path / "bare" / "bin" / "python"
    target = next((tmp_path / "bare" / "lib").glob("python3*")) / "site-packages"
    install = ["install", "-qq", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    lent = [path for path in sys.path if path.endswith("site-packages")]
    names = [module_name(path) for path in sources() if path.name == "__init__.py"]
    script = f"""
import sys, importlib
from pathlib import Path
sys.path += {lent!r}
for name in {names!r}:
    module = importlib.import_module(name)
    assert Path(module.__file__).is_relative_to({str(target)!r}), module.__file__
import reattend
here = Path(reattend.__file__).parent
print(sorted(path.name for path in here.iterdir() if path.name != "__pycache__"))
print(len(list((here / "recipes").glob("*.yaml"))))
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = [str(python), "-c", script]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    listing, recipes = done.stdout.splitlines()
    assert "py.typed" in listing
    assert not {"tests", "examples", "benchmarks", "docs", "tree"} & set(ast.literal_eval(listing))
    assert int(recipes) == len(list((ROOT / "recipes").glob("*.yaml")))
