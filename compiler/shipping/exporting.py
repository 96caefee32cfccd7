"""One captured graph as a package that torch runs alone: an ExportedProgram, or compiled by AOTInductor.

reattend's operators are traced as what they mean in plain torch, so that neither package needs reattend where it runs.
Inputs are the call's tensors by name; the output is the model's, Hugging Face outputs as plain dicts.
"""

from __future__ import annotations

import inspect
import itertools
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..capture import Captured
from ..containers import Layout, put_together
from ..primitives.operator import called
from ..ranges import Sizes
from ..refusal import Refused

_TRIED = (3, 8, 5, 16, 7, 32, 64, 128, 2, 256, 1)  # sizes that symbols are tried at, unlike ones first


def why_not_export(captured: Captured) -> str:
    """Why a captured graph cannot be a package of its own, or ""."""
    if captured.key.setting[:1] != ("eval",):
        return f"captured in {captured.key.setting[0]}: call it once in eval()"
    if captured.writes:
        return f"a run writes to {captured.writes[0]}"
    composed = [n for n, layout in captured.layouts if layout.kind not in ("tensor", "value")]
    if composed or captured.grown:
        return f"the call takes {', '.join(composed)}: call it once with tensors only (use_cache=False)"
    return ""


def why_no_compiler() -> str:
    """Why AOTInductor cannot compile on this machine, or ""."""
    named = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    if any(shutil.which(c) for c in named if c):
        return ""
    return "no C++ compiler (g++ or clang++ on PATH, or CXX)"


def exported(captured: Captured) -> torch.export.ExportedProgram:
    """The graph exported again, in plain torch operations, its sizes as open as they were."""
    if reason := why_not_export(captured):
        raise Refused(reason, where="export")
    names = [name for name, layout in captured.layouts if layout.kind == "tensor"]
    tensors = dict(zip(names, _examples(captured.dims, captured.graph), strict=True))
    auto = torch.export.Dim.AUTO
    shapes = {
        name: {d: auto for d, size in enumerate(shape) if isinstance(size, str)} or None
        for name, shape in zip(names, captured.dims.shapes)
    }
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            package = torch.export.export(_Alone(captured, names), (), tensors, dynamic_shapes=shapes, strict=False)
    except (RuntimeError, TypeError, ValueError) as error:
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise Refused(said.strip()[:200], where="export", fits="save_pretrained and reattend.load") from error
    left = {str(n.target) for n in package.graph.nodes if str(n.target).startswith("reattend.")}
    assert not left, f"operators of reattend stayed in the package: {left}"
    return package


def write_torch(captured: Captured, path: Path) -> Path:
    """An ExportedProgram: torch.export.load(path).module()(input_ids=ids)."""
    package = exported(captured)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(package, str(path))
    return path


def write_aoti(captured: Captured, path: Path) -> Path:
    """An AOTInductor package: torch._inductor.aoti_load_package(path)(input_ids=ids)."""
    if reason := why_no_compiler():
        raise Refused(reason, where="export aoti", fits="install one, or export 'torch'")
    package = exported(captured)
    path.parent.mkdir(parents=True, exist_ok=True)
    from torch._inductor import aoti_compile_and_package

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        aoti_compile_and_package(package, package_path=str(path))
    return path


class _Alone(nn.Module):
    """The graph as a module whose forward takes the call's tensors by name and gives plain containers."""

    def __init__(self, captured: Captured, names: list[str]) -> None:
        super().__init__()
        self.model = captured.graph
        output = _plain(captured.output)

        def forward(*given: Tensor, **named: Tensor) -> Any:
            tensors = (*given, *(named[n] for n in names[len(given) :]))
            flat = _Plainly(self.model).run(*tensors, enable_io_processing=False)
            return put_together(output, flat[: output.count])

        said = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]
        forward.__signature__ = inspect.Signature(said)  # type: ignore[attr-defined]
        self.__dict__["forward"] = forward


class _Plainly(fx.Interpreter):
    """Runs a graph with reattend's operators as plain torch operations."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        primitive = called(target)
        if primitive is not None:
            return primitive.plainly(*args, **kwargs)
        return super().call_function(target, args, kwargs)


def _plain(layout: Layout) -> Layout:
    """The same layout in Python's own containers, which every process knows."""
    parts = tuple(_plain(p) for p in layout.parts)
    if layout.kind == "argument":
        raise Refused(f"the output gives back the argument {layout.value}", where="export")
    if layout.kind in ("fields", "object", "mapping"):
        return replace(layout, kind="mapping", type=dict, parts=parts)
    return (
        replace(layout, type=list if layout.type is list else tuple, parts=parts) if layout.kind == "items" else layout
    )


def _examples(dims: Sizes, graph: fx.GraphModule) -> list[Tensor]:
    """Tensors of sizes that the graph holds for, zeros all of them: only their sizes are read."""
    device = next((p.device for p in graph.parameters()), torch.device("cpu"))
    for values in itertools.islice(_assignments(dims), 5000):
        shapes = [[_sized(size, values) for size in shape] for shape in dims.shapes]
        if all(size >= 0 for shape in shapes for size in shape):
            found = [torch.zeros(shape, dtype=d, device=device) for shape, d in zip(shapes, dims.dtypes)]
            try:
                dims.check(found)
            except Refused:
                continue
            return found
    raise Refused(f"no sizes found for {dims}", where="export", fits="save_pretrained and reattend.load")


def _assignments(dims: Sizes) -> Iterator[dict[str, int]]:
    choices = []
    for number, symbol in enumerate(dims.symbols.values()):
        turned = _TRIED[number % 4 :] + _TRIED[: number % 4]
        fitting = [v for v in turned if v >= symbol.least and (symbol.most is None or v <= symbol.most)]
        choices.append(fitting or [symbol.least])
    return (dict(zip(dims.symbols, values)) for values in itertools.product(*choices))


def _sized(size: int | str, values: dict[str, int]) -> int:
    """A size of the layout at given symbols; an expression is left to the check where it is more than a symbol."""
    if isinstance(size, int):
        return size
    return values[size] if size in values else int(eval(size, {"__builtins__": {}, "min": min, "max": max}, values))
