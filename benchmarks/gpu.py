"""Generated kernels on a GPU, against its measured ceilings and against peers: out/gpu.json, and a table on the screen.

    python benchmarks/gpu.py [--tokens 1024 4096 16384] [--dim 64 128] [--out out/gpu.json]

Numbers are checked against float32 torch first; a kernel that fails the check has no speed, nor has a peer that answers
otherwise. Contestants of one row run interleaved; a figure is the median. Peers: torch's own attention, compiled
flex_attention, flash-linear-attention where it is installed (benchmarks/gpu_cases.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reattend.benchmarks.gpu_cases import FORMATS, Case, Run, Sizes, cases, dense_layer, layer, one_token
from reattend.codegen import triton
from reattend.codegen.used import Call
from reattend.compiler.primitives.operator import PRIMITIVES, Kernel

HEADS, BATCH_TOKENS, ROUNDS, BUDGET = 16, 16384, 15, 420.0  # seconds that the whole may take
LAYER, CHECKED = 4096, 300  # inputs and outputs of a quantized layer; tokens of a check
TOLERANCE = 2e-2  # of bfloat16, relative to the largest number


@dataclass(frozen=True)
class Asked:
    """A case at the sizes of one row of the table, and at those that its numbers are checked at."""

    case: Case
    at: Sizes
    checked: Sizes
    beside: Callable[[Call], dict[str, Run]] = lambda call: {}  # timed along, with numbers of their own


@dataclass
class Device:
    """What is measured on: its name and versions, and the most that it does."""

    about: dict[str, str]
    most: Mapping[str, float]
    wrong: dict[str, str] = field(default_factory=dict)  # by case and head size, "" where nothing is


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="*", type=int, default=[1024, 4096, 16384])
    parser.add_argument("--dim", nargs="*", type=int, default=[64, 128])
    parser.add_argument("--cases", nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=Path("out/gpu.json"))
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here: `python benchmarks/triton_table.py` compiles the kernels for those that are elsewhere")
    began, rows = time.monotonic(), list[dict[str, Any]]()
    device = Device(about(), ceilings())
    print(json.dumps({**device.about, **device.most}))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for asked in table(given.tokens, given.dim, given.cases):
        if time.monotonic() - began > BUDGET:
            print("the time is up: the rest is left out")
            break
        rows.append(row(asked, device))
        print(json.dumps(rows[-1]), flush=True)
        given.out.write_text(json.dumps({"device": device.about, "ceilings": device.most, "rows": rows}, indent=1))


def table(tokens: list[int], dims: list[int], names: list[str]) -> Iterator[Asked]:
    """What is asked, the short ones first: there is a limit to the time."""
    for dim in dims:
        for keys in (4096, 32768):  # how keys are shared depends on their number: checked at the same
            sizes = Sizes(8, HEADS, keys, dim, "cuda")
            yield Asked(one_token(), sizes, sizes)
    for format, group in FORMATS:
        for rows in (16, 2048):
            sizes = Sizes(1, 1, rows, LAYER, "cuda")
            yield Asked(layer(format, group), sizes, sizes, lambda call: {"bfloat16": dense_layer(call)})
    for case in cases():
        for dim in dims:
            for length in tokens:
                if not names or case.name in names:
                    sizes = Sizes(max(1, BATCH_TOKENS // length), HEADS, length, dim, "cuda")
                    yield Asked(case, sizes, Sizes(1, HEADS, CHECKED, dim, "cuda"))


def row(asked: Asked, device: Device) -> dict[str, Any]:
    """What is wrong, or milliseconds and how near they come to the most that the device does."""
    case, at = asked.case, asked.at
    found: dict[str, Any] = {"case": case.name, "dim": at.dim, "tokens": at.tokens}
    key = f"{case.name} {asked.checked}"
    if key not in device.wrong:
        device.wrong[key] = check(case, asked.checked)
    if device.wrong[key]:
        return found | {"wrong": device.wrong[key]}
    call = case.call(at)
    results = kernel(call).run(call.groups, call.text)
    same, others = agreeing(case.others(call), results[0])
    times = medians({"ours": lambda: kernel(call).run(call.groups, call.text), **same, **asked.beside(call)})
    touched = [t for group in (*call.groups, results) for t in group]
    flops, read = case.flops(at, call.text), sum(t.numel() * t.element_size() for t in touched)
    bound = max(flops / device.most["TFLOP/s"] / 1e9, read / device.most["TB/s"] / 1e9)
    found |= {f"{name} ms": round(ms, 4) for name, ms in times.items()} | others
    found |= {"TFLOP/s": round(flops / times["ours"] / 1e9, 1), "TB/s": round(read / times["ours"] / 1e9, 3)}
    found["of the ceiling"] = round(bound / times["ours"], 3)
    return found | backwards(case, call, results)


def backwards(case: Case, call: Call, results: list[Tensor]) -> dict[str, float]:
    ours = kernel(call).gradients
    if not case.learns or ours is None:
        return {}
    run: Run = lambda: ours(call.groups, call.text, results, {0: results[0]}, case.learns)
    times = medians({"ours": run, **case.backwards(call)})
    return {f"{name} backward ms": round(ms, 4) for name, ms in times.items()}


def check(case: Case, sizes: Sizes) -> str:
    """What is wrong with values or gradients, "" where nothing is."""
    call = case.call(sizes)
    primitive, ours = PRIMITIVES[call.primitive], kernel(call)
    reason = ours.refuses(call.groups, call.text)
    if reason:
        return f"refused: {reason}"
    exact = [[wide(t) for t in group] for group in call.groups]
    leaves = [[t for group in exact for t in group][n].requires_grad_() for n in case.learns]
    expected, results = primitive.meaning(exact, call.text)[0], ours.run(call.groups, call.text)
    pairs = [("o", results[0], expected)]
    if case.learns and ours.gradients is not None:
        up = torch.randn_like(expected)
        slopes = torch.autograd.grad(expected, leaves, up)
        found = ours.gradients(call.groups, call.text, results, {0: up.to(results[0].dtype)}, case.learns)
        if found is None:
            return "no gradient"
        pairs += [(f"d{n}", a, b) for n, a, b in zip(case.learns, found, slopes, strict=True) if a is not None]
    wrong = [f"{name} is {apart(a, b):.2g} apart" for name, a, b in pairs if not apart(a, b) < TOLERANCE]
    return ", ".join(wrong)


def wide(t: Tensor) -> Tensor:
    return t.float() if t.dtype == torch.bfloat16 else t.clone()


def apart(found: Tensor, exact: Tensor) -> float:
    found, exact = found.detach().float(), exact.detach().float()
    return float((found - exact).abs().max() / exact.abs().max())


def agreeing(others: Mapping[str, Run], ours: Tensor) -> tuple[dict[str, Run], dict[str, str]]:
    """The peers that compute the same, and why the rest have no times."""
    same, reasons = dict[str, Run](), dict[str, str]()
    for name, run in others.items():
        try:
            found = run()
        except Exception as error:  # whatever a peer does not take is said in its column
            reasons[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
            continue
        distance = apart(found if isinstance(found, Tensor) else found[0], ours)
        if distance < 2 * TOLERANCE:
            same[name] = run
        else:
            reasons[name] = f"{distance:.2g} apart"
    return same, reasons


def kernel(call: Call) -> Kernel:
    return next(k for k in PRIMITIVES[call.primitive].kernels["cuda"] if k.name == triton.NAME)


def about() -> dict[str, str]:
    import triton as compiler

    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": compiler.__version__,
            "date": time.strftime("%Y-%m-%d")}  # fmt: skip


def ceilings() -> dict[str, float]:
    """What this device does on a large product, and on a copy."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    product, copy = medians({"product": lambda: a @ a, "copy": lambda: b.clone()}).values()
    return {"TFLOP/s": round(2 * 8192**3 / product / 1e9, 1), "TB/s": round(2 * b.numel() / copy / 1e9, 2)}


def medians(contestants: Mapping[str, Run]) -> dict[str, float]:
    """Milliseconds, interleaved."""
    for call in contestants.values():
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, call in contestants.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(each) for name, each in times.items()}


if __name__ == "__main__":
    main()
