"""Linear layers over stored weights against bf16 `linear` and torch's own kernels: one run, interleaved medians.

    python benchmarks/quantized_linear.py [--size 4096] [--rows 1 2 4 8 16 64 512] [--runs 15] [--json FILE] [--md FILE]

Numerics first. Rounding of activations is part of a call. torchao's weight-only scheme is `_weight_int8pack_mm` as it
stands in eager mode; its dynamic scheme the same rounding and `_int_mm`. The bound of few rows: a loop that does
nothing but read as many bytes as a weight of 8 bits has.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

import reattend  # noqa: F401 - registers schemes and kernels
from reattend.codegen.cpu import qlinear as plain
from reattend.codegen.cpu.qlinear_units import road
from reattend.codegen.cpu.skeleton import skeleton
from reattend.codegen.cpu.toolchain import toolchain
from reattend.compiler.bench import machine
from reattend.compiler.mechanism import mechanism
from reattend.compiler.primitives.operator import watched
from reattend.compiler.primitives.qlinear import qlinear, rounded_rows
from reattend.compiler.primitives.qlinear_spec import QLinearSpec, dequantized

SCHEMES = ("w8", "w8a8", "w4a16", "qserve")
Calls = dict[str, Callable[[], Any]]


def stored(scheme: str, weight: Tensor) -> tuple[list[Tensor], QLinearSpec]:
    layer: Any = mechanism(scheme).layer(weight)  # type: ignore[attr-defined]
    return [getattr(layer, name) for name in layer.spec.names], layer.spec


def near(x: Tensor, tensors: list[Tensor], spec: QLinearSpec) -> float:
    """The largest error of a call, of its largest output, against the stored weights in float64."""
    wide = x.double()
    if spec.activations:
        whole, scale = rounded_rows(x.float(), tensors[1].dtype)
        wide = whole.double() * scale.double()
    exact = wide @ dequantized(tensors, spec).T
    return float((qlinear(x, tensors, spec).double() - exact).abs().max() / exact.abs().max())


def calls_at(x: Tensor, weight: Tensor, layers: dict[str, tuple[list[Tensor], QLinearSpec]]) -> Calls:
    own = weight.to(x.dtype)
    found: Calls = {"bf16 linear": lambda: torch.nn.functional.linear(x, own)}
    for scheme, (tensors, spec) in layers.items():
        found[scheme] = lambda tensors=tensors, spec=spec: qlinear(x, tensors, spec)  # type: ignore[misc]
    if len(x) <= 8:  # beyond, it is many times slower
        found["_weight_int8pack_mm"] = lambda: plain.by_bytes([[x], layers["w8"][0]], layers["w8"][1].text)
    if (read := reading(layers["w8"][0][0])) is not None:
        found["reading 8 bits"] = read
    found["rounding, _int_mm"] = lambda: plain.by_whole([[x], layers["w8a8"][0]], layers["w8a8"][1].text)
    return found


_READ = """
extern "C" int run(const int32_t* from, int64_t count, int threads) {
    int kept = 0;
#pragma omp parallel num_threads(threads) reduction(+ : kept)
    {
        const int64_t each = count / threads / (8 * VL) * 8 * VL;
        vi sum[8] = {};
        for (const int32_t *at = from + omp_get_thread_num() * each, *end = at + each; at < end; at += 8 * VL)
            for (int l = 0; l < 8; l++) sum[l] += load(at + l * VL);
        for (int l = 0; l < 8; l++) kept += total(sum[l]);
    }
    return kept;
}
"""


def reading(codes: Tensor) -> Callable[[], Any] | None:
    """A loop that reads these bytes and does nothing with them."""
    if (tools := toolchain()) is None:
        return None
    run = tools.build(skeleton(said=[_READ])).run
    run.argtypes, count = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int], codes.nbytes // 4
    return lambda: run(codes.data_ptr(), count, torch.get_num_threads())


def times(calls: Calls, runs: int) -> dict[str, float]:
    """Medians in milliseconds, one call of each in turn."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(runs + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if run > 1:
                spent[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(found) for name, found in spent.items()}


def kernel_of(call: Callable[[], Any]) -> str:
    with watched() as ran:
        call()
    return ran[0].kernel if ran else ""


def table(found: dict[int, dict[str, float]]) -> str:
    names = list(dict.fromkeys(name for row in found.values() for name in row))
    lines = ["| rows | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for rows, row in found.items():
        base = row["bf16 linear"]
        cells = [f"{row[n]:.2f} ms, {base / row[n]:.2f}" if n in row else "" for n in names]
        lines.append(f"| {rows} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 2, 4, 8, 16, 64, 512])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json")
    parser.add_argument("--md")
    given = parser.parse_args()
    torch.manual_seed(0)
    weight = torch.randn(given.size, given.size) / given.size**0.5
    layers = {scheme: stored(scheme, weight) for scheme in SCHEMES}
    found: dict[int, dict[str, float]] = {}
    kernels: dict[int, dict[str, str]] = {}
    for rows in given.rows:
        x = torch.randn(rows, given.size).to(torch.bfloat16)
        if rows <= 8:
            for scheme, (tensors, spec) in layers.items():
                error = near(x, tensors, spec)
                assert error < 2**-6, f"{scheme} at {rows} rows: off by {error:.2g} of the largest output"
        calls = calls_at(x, weight, layers)
        kernels[rows] = {scheme: kernel_of(calls[scheme]) for scheme in SCHEMES}
        found[rows] = times(calls, given.runs if rows < 512 else max(5, given.runs // 3))
    text = table(found)
    print(machine(), text, sep="\n")
    if given.md:
        with open(given.md, encoding="utf-8") as file:
            begin = f"<!-- measured {road() or 'torch'} -->\n"
            before, _, rest = file.read().partition(begin)
            after = rest.partition("<!-- end -->")[2]
        with open(given.md, "w", encoding="utf-8") as file:
            file.write(f"{before}{begin}{machine()}, {platform.machine()}\n\n{text}\n<!-- end -->{after}")
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump({"machine": machine(), "milliseconds": found, "kernels": kernels}, file, indent=1)


if __name__ == "__main__":
    main()
