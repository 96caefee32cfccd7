"""Generated kernels on a GPU, against its measured ceilings and against peers: out/gpu.json, and a table on the screen.

    python benchmarks/gpu.py [--tokens 1024 4096 16384] [--dim 64 128] [--out out/gpu.json]

Numbers are checked against float32 torch first; a kernel that fails the check has no speed. Contestants of one row run
interleaved; a figure is the median. Peers: torch's own attention, compiled flex_attention.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reattend.codegen.triton import launch, launch_gradient, qlinear
from reattend.codegen.used import Call, calls_of
from reattend.compiler.cost import density
from reattend.compiler.primitives.attend import attend
from reattend.compiler.primitives.attend_meaning import attend_meaning
from reattend.compiler.primitives.qlinear import qlinear_meaning
from reattend.compiler.primitives.qlinear_spec import QLinearSpec
from reattend.compiler.symbols import table

HEADS, BATCH_TOKENS, ROUNDS, BUDGET = 16, 16384, 15, 420.0  # seconds that the whole may take
LAYER = 4096  # inputs and outputs of a quantized layer
TOLERANCE = 2e-2  # of bfloat16, relative to the largest number
SLOPES = 2.0 ** -torch.arange(1.0, HEADS + 1)
CASES: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "full": {},
    "window 256 and 4 sinks": {"causal": True, "keep": lambda i, j: (i - j < 256) | (j < 4)},
    "softcap": {"causal": True, "score": lambda s: torch.tanh(s / 30) * 30},
    "slopes of heads": {"causal": True, "score": lambda s, h, i, j: s + table(SLOPES)[h] * (j - i)},
    "sigmoid": {"causal": True, "weight": torch.sigmoid, "normaliser": "none"},
    "relu squared over its sum": {"causal": True, "weight": lambda s: torch.relu(s) ** 2, "normaliser": "sum"},
    "stick-breaking": {"causal": True, "normaliser": "stick"},
}
Timed = dict[str, Callable[[], object]]
Made = Callable[[tuple[int, ...]], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="*", type=int, default=[1024, 4096, 16384])
    parser.add_argument("--dim", nargs="*", type=int, default=[64, 128])
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--out", type=Path, default=Path("out/gpu.json"))
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here: `python benchmarks/triton_table.py` compiles the kernels for those that are elsewhere")
    began, rows = time.monotonic(), list[dict[str, Any]]()
    about, most = device(), ceilings()
    print(json.dumps(about | most))
    rows += tokens_and_layers(given.dim)
    for case in given.cases:
        for dim in given.dim:
            wrong = check(case, dim)
            for tokens in given.tokens:
                if time.monotonic() - began > BUDGET:
                    print("the time is up: the rest is left out")
                    return
                row = {"case": case, "dim": dim, "tokens": tokens, "wrong": wrong}
                row |= {} if wrong else measured(case, dim, tokens, most["TFLOP/s"])
                rows.append(row)
                print(json.dumps(row), flush=True)
                given.out.parent.mkdir(parents=True, exist_ok=True)
                given.out.write_text(json.dumps({"device": about, "ceilings": most, "rows": rows}, indent=1))


def tokens_and_layers(dims: list[int]) -> list[dict[str, Any]]:
    """One token that reads many keys, by programs that share them and by one each; quantized layers."""
    rows = []
    for dim in dims:
        for keys in (4096, 32768):
            rows.append({"case": "one token", "dim": dim, "tokens": keys} | one_token(dim, keys))
    for format, group in (("int8", 0), ("qoq", 128), ("int4", 128)):
        for tokens in (16, 2048):
            rows.append({"case": f"layer of {format}", "dim": LAYER, "tokens": tokens} | layer(format, group, tokens))
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows


def one_token(dim: int, keys: int) -> dict[str, Any]:
    q = torch.randn(8, 4 * HEADS // 2, 1, dim, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(8, HEADS // 2, keys, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    (call,) = calls_of(lambda: attend(*(t.cpu()[:, :, :4] for t in (q, k, v))))
    groups = [[q], [k, v], []]
    exact = attend_meaning([[t.float() for t in group] for group in groups], call.text)[0]
    contestants: Timed = {
        "ours": lambda: launch.run(groups, call.text),
        "not shared": lambda: launch.run(groups, call.text, shares=1),
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    }
    return timed(contestants, launch.run(groups, call.text)[0], exact, 2.0 * (k.numel() + v.numel()))


def layer(format: str, group: int, tokens: int) -> dict[str, Any]:
    """Any codes: the time does not depend on them."""
    spec = QLinearSpec(format, LAYER, group, "" if format == "int4" else "int8")
    x = torch.randn(tokens, LAYER, device="cuda", dtype=torch.bfloat16)
    small: Made = lambda sizes: torch.rand(sizes, device="cuda", dtype=torch.float16) * 0.01
    whole: Made = lambda sizes: torch.randint(1, 9, sizes, device="cuda", dtype=torch.int8)
    codes = torch.randint(0, 256, (LAYER, LAYER // 2), device="cuda", dtype=torch.uint8)
    size = (LAYER, spec.groups)
    tensors = {
        "int8": [whole((LAYER, LAYER)), small((LAYER,))],
        "int4": [codes, small(size), small(size)],
        "qoq": [codes, small((LAYER,)), whole(size), whole(size)],
    }[format]
    groups = [[x], tensors]
    dense = torch.randn(LAYER, LAYER, device="cuda", dtype=torch.bfloat16)
    contestants: Timed = {"ours": lambda: qlinear.run(groups, spec.text), "bfloat16": lambda: F.linear(x, dense)}
    found, exact = qlinear.run(groups, spec.text)[0], qlinear_meaning(groups, spec.text)[0]
    return timed(contestants, found, exact.float(), float(tensors[0].numel()))


def timed(contestants: Timed, found: Tensor, exact: Tensor, read: float) -> dict[str, Any]:
    """Milliseconds, and the bytes of keys or codes that pass in one; only of results that are right."""
    apart = float((found.float() - exact).abs().max() / exact.abs().max())
    if not apart < TOLERANCE:
        return {"wrong": f"{apart:.2g} apart"}
    times = medians(contestants)
    return {f"{name} ms": round(ms, 4) for name, ms in times.items()} | {"TB/s": round(read / times["ours"] / 1e9, 3)}


def device() -> dict[str, Any]:
    import triton

    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
            "date": time.strftime("%Y-%m-%d")}  # fmt: skip


def ceilings() -> dict[str, float]:
    """What this device does on a large product, and on a copy."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    product, copy = medians({"product": lambda: a @ a, "copy": lambda: b.clone()}).values()
    return {"TFLOP/s": round(2 * 8192**3 / product / 1e9, 1), "TB/s": round(2 * b.numel() / copy / 1e9, 2)}


def asked(case: str, dim: int, tokens: int, dtype: torch.dtype = torch.bfloat16) -> Call:
    """The call of a case: its text is that of a few tokens."""
    few = torch.zeros(1, HEADS, 4, dim)
    (call,) = calls_of(lambda: attend(few, few, few, **CASES[case]))
    sizes = max(1, BATCH_TOKENS // tokens), HEADS, tokens, dim
    q, k, v = (torch.randn(sizes, device="cuda", dtype=dtype) for _ in range(3))
    return Call(call.primitive, [[q], [k, v], [t.cuda() for t in call.groups[2]]], call.text)


def check(case: str, dim: int) -> str:
    """What is wrong with values or gradients, "" where nothing is."""
    call = asked(case, dim, 300)
    small = [[t[:1] if t.ndim == 4 else t for t in group] for group in call.groups]
    exact = [[t.float().requires_grad_() for t in group] for group in small]
    (expected,) = attend_meaning(exact, call.text)
    up = torch.randn_like(expected)
    leaves = [exact[0][0], *exact[1]]
    slopes = torch.autograd.grad(expected, leaves, up)
    (o,) = launch.run(small, call.text)
    found = launch_gradient.gradients(small, call.text, [o], {0: up.to(o.dtype)}, (0, 1, 2))
    assert found is not None
    for name, a, b in zip(("o", "dq", "dk", "dv"), (o, *found), (expected, *slopes)):
        assert a is not None
        apart = float((a.float() - b).abs().max() / b.abs().max())
        if not apart < TOLERANCE:
            return f"{name} is {apart:.2g} apart"
    return ""


def measured(case: str, dim: int, tokens: int, peak: float) -> dict[str, Any]:
    call = asked(case, dim, tokens)
    (q,), (k, v), _ = call.groups
    (o,) = launch.run(call.groups, call.text)
    flops = 4 * q.numel() * tokens * density(call.text, tokens, tokens)
    times = medians({"ours": lambda: launch.run(call.groups, call.text), **peers(case, q, k, v)})
    row: dict[str, Any] = {f"{name} ms": round(ms, 4) for name, ms in times.items()}
    row |= {
        "TFLOP/s": round(flops / times["ours"] / 1e9, 1),
        "of the ceiling": round(flops / times["ours"] / 1e9 / peak, 3),
    }
    if launch_gradient.gradients(call.groups, call.text, [o], {0: o}, (0, 1, 2)) is not None:
        both = {"ours": lambda: launch_gradient.gradients(call.groups, call.text, [o], {0: o}, (0, 1, 2))}
        row |= {f"{name} backward ms": round(ms, 4) for name, ms in medians(both | backwards(case, q, k, v)).items()}
    return row


def peers(case: str, q: Tensor, k: Tensor, v: Tensor) -> Timed:
    """Other ways to compute the same."""
    found: Timed = {}
    if case in ("full", "causal"):
        found["sdpa"] = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=case == "causal")
    flex = flexed(case, q)
    return found | ({"flex": lambda: flex(q, k, v)} if flex is not None else {})


def backwards(case: str, q: Tensor, k: Tensor, v: Tensor) -> Timed:
    if case not in ("full", "causal"):
        return {}
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, is_causal=case == "causal")
    return {"sdpa": lambda: torch.autograd.grad(o, (q, k, v), o.detach(), retain_graph=True)}


def flexed(case: str, q: Tensor) -> Callable[..., Tensor] | None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens, slopes = q.shape[2], SLOPES.cuda()
    scores: dict[str, Any] = {
        "softcap": lambda s, b, h, i, j: torch.tanh(s / 30) * 30,
        "slopes of heads": lambda s, b, h, i, j: s + slopes[h] * (j - i),
    }
    masks: dict[str, Any] = {"window 256 and 4 sinks": lambda b, h, i, j: (j <= i) & ((i - j < 256) | (j < 4))}
    if case in ("sigmoid", "relu squared over its sum", "stick-breaking"):
        return None
    keep = None if case == "full" else masks.get(case, lambda b, h, i, j: j <= i)
    blocks = None if keep is None else create_block_mask(keep, None, None, tokens, tokens, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, score_mod=scores.get(case), block_mask=blocks)


def medians(contestants: Timed) -> dict[str, float]:
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
