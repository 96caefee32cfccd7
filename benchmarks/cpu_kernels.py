"""Generated CPU kernels beside torch's fused attention: numerics first, then interleaved times, medians and ratios.

    python benchmarks/cpu_kernels.py [--tokens 1024 4096 16384] [--dtype float32 bfloat16] [--flex] [--json FILE]

One batch, 8 heads of 64, 2 threads. The bound of a row is its floating-point operations at the speed of the same run's
products: a matrix product where a processor has units for it, else multiplications that never leave the registers:
torch's product is not the fastest everywhere. A result above it is an error of the benchmark, not a success.
flex_attention gets its BlockMask ready.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from reattend.codegen.cpu.skeleton import skeleton
from reattend.codegen.cpu.toolchain import NO_COMPILER, toolchain
from reattend.compiler.doctor import cpu_flags
from reattend.compiler.primitives.attend import Tiles, attend
from reattend.compiler.primitives.operator import watched
from reattend.compiler.primitives.scan import scan
from reattend.compiler.symbols import table

HEADS, SIZE, AGENTS = 8, 64, 49
Call = Callable[[], Tensor]
Work = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A call, what it is compared with, and the floating-point operations that it cannot do without."""

    run: Work
    rival: str  # "causal" or "full": which use of torch's fused attention
    flops: Callable[[int], float]
    eager: Work | None = None  # the same written out, for small sizes


def half(n: int) -> float:
    """The lower triangle of two products."""
    return 2.0 * n * n * SIZE * HEADS


def cases() -> Mapping[str, Case]:
    slopes = table(torch.exp2(-torch.arange(1.0, HEADS + 1.0)))
    seen = 260
    return {
        "causal softmax": Case(lambda q, k, v: attend(q, k, v, causal=True), "causal", half),
        "softcap": Case(
            lambda q, k, v: attend(q, k, v, causal=True, score=lambda s: torch.tanh(s / 30) * 30), "causal", half
        ),
        "ALiBi": Case(
            lambda q, k, v: attend(q, k, v, causal=True, score=lambda s, h, i, j: s - slopes[h] * (i - j)),
            "causal",
            half,
        ),
        "sigmoid": Case(
            lambda q, k, v: attend(q, k, v, causal=True, weight=lambda s: torch.sigmoid(s), normaliser="none"),
            "causal",
            half,
        ),
        "window 256 + 4": Case(
            lambda q, k, v: attend(q, k, v, causal=True, keep=lambda i, j: (i - j < 256) | (j < 4)),
            "causal",
            lambda n: 4 * n * min(seen, n / 2) * SIZE * HEADS,
        ),
        "tiles 1/8": Case(lambda q, k, v: attend(q, k, v, tiles=listed(q)), "full", lambda n: half(n) / 4),
        "causal linear": Case(
            lambda q, k, v: scan(q, k, v, feature=lambda x: F.elu(x) + 1, normaliser="sum", eps=1e-6),
            "causal",
            lambda n: 4 * n * SIZE * SIZE * HEADS,
        ),
        "agent (49)": Case(agent, "full", lambda n: 8 * n * AGENTS * SIZE * HEADS),
    }


def listed(q: Tensor) -> Tiles:
    """An eighth of the tiles of 64 keys, drawn for each tile of 64 queries."""
    count = q.shape[2] // 64
    drawn = torch.rand(1, HEADS, count, count, generator=torch.Generator().manual_seed(0))
    return Tiles(drawn.topk(max(1, count // 8), -1).indices.sort(-1).values, 64, 64)


def agent(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The two attends of agent attention, agents pooled from the queries."""
    agents = F.adaptive_avg_pool1d(q.flatten(0, 1).mT.float(), AGENTS).mT.unflatten(0, q.shape[:2]).to(q.dtype)
    return attend(q, agents, attend(agents, k, v))


def checked(case: Case, dtype: torch.dtype) -> float:
    """Largest difference from the same call in float64, at a size where its plain meaning is cheap."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, HEADS, 640, SIZE, generator=generator).to(dtype) for _ in range(3))
    found = case.run(q, k, v).double()
    difference = (found - case.run(q.double(), k.double(), v.double())).abs().max() / found.abs().max().clamp(min=1)
    allowed = 1e-5 if dtype == torch.float32 else 2e-2  # bfloat16: a rounding of the weights and one of the output
    if not difference <= allowed:
        raise SystemExit(f"wrong by {difference:.1e} in {dtype}: no time is taken of wrong numbers")
    return float(difference)


@dataclass(frozen=True)
class Measured:
    case: str
    dtype: str
    tokens: int
    kernel: str
    ms: float
    ratio: float  # torch's fused attention / ours
    rival: str
    of_bound: float  # time at the machine's fastest product / ours
    difference: float
    flex_ratio: float | None = None


def measure(name: str, case: Case, dtype: torch.dtype, tokens: int, *, runs: int, flex: bool) -> Measured:
    q, k, v = (torch.randn(1, HEADS, tokens, SIZE).to(dtype) for _ in range(3))
    product, operations = fastest_product(dtype)
    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: case.run(q, k, v),
        "rival": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=case.rival == "causal"),
        "product": product,
    }
    if flex and name in _FLEX:
        calls["flex"] = _flex(name, q, k, v)
    with watched() as ran, torch.no_grad():
        calls["ours"]()
    times: dict[str, list[float]] = {which: [] for which in calls}
    with torch.no_grad():
        for call in calls.values():
            call()
        for _ in range(runs):
            for which, call in calls.items():
                start = time.perf_counter()
                call()
                times[which].append(time.perf_counter() - start)
    median = {which: statistics.median(found) for which, found in times.items()}
    peak = operations / min(times["product"])
    of_bound = case.flops(tokens) / peak / median["ours"]
    if of_bound > 1.05:
        raise SystemExit(f"{name}: {of_bound:.2f} of what the machine can do: something was not computed")
    return Measured(
        case=name,
        dtype=str(dtype).removeprefix("torch."),
        tokens=tokens,
        kernel=" + ".join(dict.fromkeys(call.kernel or "eager" for call in ran)),
        ms=1e3 * median["ours"],
        ratio=median["rival"] / median["ours"],
        rival=case.rival,
        of_bound=of_bound,
        difference=checked(case, dtype),
        flex_ratio=median["flex"] / median["ours"] if "flex" in median else None,
    )


_VECTORS = """
extern "C" float run(int64_t times, int threads) {
    float kept = 0;
#pragma omp parallel num_threads(threads) reduction(+ : kept)
    {
        vf sum[12], a = all(1.0000001f), b = all(1e-9f);
        for (int n = 0; n < 12; n++) sum[n] = all((float)n);
        for (int64_t k = 0; k < times; k++)
            for (int n = 0; n < 12; n++) sum[n] = ONCE;
        for (int n = 0; n < 12; n++) kept += sum[n][0];
    }
    return kept;
}
extern "C" int width() { return VL; }
"""


def fastest_product(dtype: torch.dtype) -> tuple[Callable[[], Any], float]:
    """What this machine multiplies fastest with for a type, and how many operations that is."""
    if dtype == torch.bfloat16 and "amx_bf16" in cpu_flags():
        a = torch.randn(2048, 2048).to(dtype)
        return lambda: a @ a, 2 * 2048**3
    tools = toolchain()
    if tools is None:
        raise SystemExit(NO_COMPILER)
    pairs = dtype == torch.bfloat16 and "avx512_bf16" in cpu_flags()
    once = "dot(sum[n], (vi)a, (vi)b)" if pairs else "sum[n] * a + b"
    text = skeleton(said=[f"#define ONCE {once}", _VECTORS], halves="dots" if pairs else "")
    library, times, threads = tools.build(text), 1 << 22, torch.get_num_threads()
    library.run.argtypes, library.run.restype = [ctypes.c_int64, ctypes.c_int], ctypes.c_float
    return lambda: library.run(times, threads), 2.0 * (1 + pairs) * 12 * library.width() * times * threads


_FLEX = ("causal softmax", "softcap", "ALiBi", "window 256 + 4")


def _flex(name: str, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def keep(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (j <= i) & ((i - j < 256) | (j < 4)) if name.startswith("window") else j <= i

    def score(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        if name == "softcap":
            return torch.tanh(s / 30) * 30
        return s - torch.exp2(-(h + 1.0)) * (i - j) if name == "ALiBi" else s

    mask = create_block_mask(keep, None, None, q.shape[2], q.shape[2], device="cpu")
    torch.compiler.reset()  # each case is compiled for itself: past its limit torch would fall back to eager
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, score_mod=score, block_mask=mask)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--only", nargs="+", help="cases by name")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--flex", action="store_true", help="also compiled flex_attention, where it can say the same")
    parser.add_argument("--json", help="write the figures here")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    rows = []
    shown = Table("case", "dtype", "tokens", "kernel", "ms", "x sdpa", "of bound", "x flex", "difference")
    for dtype in chosen.dtype:
        for name, case in cases().items():
            if chosen.only and name not in chosen.only:
                continue
            for tokens in chosen.tokens:
                row = measure(name, case, getattr(torch, dtype), tokens, runs=chosen.runs, flex=chosen.flex)
                rows.append(row)
                flex = "" if row.flex_ratio is None else f"{row.flex_ratio:.2f}"
                shown.add_row(row.case, row.dtype, str(tokens), row.kernel, f"{row.ms:.1f}",
                              f"{row.ratio:.2f} ({row.rival})", f"{row.of_bound:.0%}", flex,
                              f"{row.difference:.0e}")  # fmt: skip
    Console(width=140).print(shown)
    if chosen.json:
        known = [flag for flag in ("avx2", "avx512f", "amx_bf16") if flag in cpu_flags()]
        facts = {"machine": platform.machine(), "has": known, "torch": torch.__version__, "threads": 2}
        with open(chosen.json, "w", encoding="utf-8") as file:
            json.dump(facts | {"rows": [asdict(row) for row in rows]}, file, indent=1)


if __name__ == "__main__":
    main()
