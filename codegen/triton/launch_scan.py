"""`scan` on a GPU: a call's tensors handed to the kernel of its spec."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from ...compiler.primitives.operator import Groups
from ...compiler.primitives.rows import repeat_heads
from ...compiler.primitives.scan_meaning import in_order, scan_meaning
from ...compiler.primitives.scan_spec import ScanSpec
from .arguments import Arguments, port
from .blocks import padded
from .launching import UnfitError, launched, precision, target, unfit
from .scan import Scan, of_spec, why_not

log = logging.getLogger("reattend")
MOST = 256  # the largest D and Dv of a state


@dataclass(frozen=True)
class Operands:
    """Tensors of one kernel, by the names that it has for them: rows that ask, keys, values, and what they share."""

    q: Tensor  # (B, H, N, D)
    k: Tensor  # (B, H | Hkv, M, D)
    v: Tensor  # (B, H | Hkv, M, E)
    decay: Tensor | None = None  # (B, H, N, W)
    documents: Tensor | None = None  # (B | 1, N)
    valid: Tensor | None = None  # (B | 1, M)
    start: Tensor | None = None  # (B, H, D, E), one more column with a normaliser


def refuses(groups: Groups, text: str) -> str | None:
    """Why a call is not handed to the kernel."""
    (q,), (k, v), _ = groups
    reason = unfit(groups) or why_not(text)
    if reason:
        return reason
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return "keys or values of another dtype than the queries"
    if max(q.shape[-1], v.shape[-1]) > MOST:
        return f"a state of {q.shape[-1]} x {v.shape[-1]}, at most {MOST} x {MOST}"
    if not q.numel() or not k.numel() or not v.numel():
        return "no rows"
    return None


def run(groups: Groups, text: str) -> list[Tensor]:
    """The outputs that a spec asks for; where no chunk fits a device, by the plain meaning."""
    (q,), _, _ = groups
    spec = ScanSpec.of(text)
    x = operands(groups, spec)
    try:
        made = scanned(of_spec(spec, channels(x.decay)), x, kind=q.dtype)
    except UnfitError as error:
        log.info("scan: %s", error)
        return scan_meaning(groups, text)
    if spec.normaliser == "none":
        made["norm"] = q.new_ones(q.shape[:3], dtype=torch.float32)
    return [made[which] for which in spec.outputs]


def channels(decay: Tensor | None) -> bool:
    return decay is not None and decay.shape[-1] > 1


def operands(groups: Groups, spec: ScanSpec) -> Operands:
    """The tensors of a call as its kernel sees them."""
    (q,), (k, v), given = groups
    tables = {f"t{n}": t for n, t in enumerate(given)}
    B, H, N, _ = q.shape
    decay, start = tables.get(spec.decay), tables.get(spec.state)
    if decay is not None:
        decay = decay if decay.shape[1] in (1, H) else repeat_heads(decay, q)
        decay = decay.expand(B, H, N, decay.shape[-1])
    return Operands(
        q,
        k.expand(B, *k.shape[1:]),
        v.expand(B, *v.shape[1:]),
        decay,
        in_order(tables[spec.documents])[:, 0].to(torch.int32) if spec.documents else None,
        (tables[spec.valid] != 0).reshape(-1, k.shape[2]).to(torch.int8) if spec.valid else None,
        None if start is None else start.expand(B, *start.shape[1:]),
    )


def scanned(
    kernel: Scan, x: Operands, *, kind: torch.dtype = torch.float32, at: Tensor | None = None
) -> dict[str, Tensor]:
    """One kernel: its outputs, o of a kind. `at`: where the slope of a feature is taken."""
    (B, _, N, D), E = x.q.shape, x.v.shape[-1]
    H, small = max(t.shape[1] for t in (x.q, x.k, x.v)), min((x.q, x.k, x.v), key=Tensor.element_size)
    columns = E + kernel.sum
    made = {
        "o": x.q.new_empty(B, H, N, E, dtype=kind),
        "state": x.q.new_empty(B, H, D, columns, dtype=torch.float32),
        "norm": x.q.new_empty(B, H, N, dtype=torch.float32),
    }
    given: Arguments = {"H": H, "N": N} | ({} if kernel.causal else {"M": x.k.shape[2]})
    for name, t in (("Q", x.q), ("K", x.k), ("V", x.v), ("X", at if kernel.slope_of else None)):
        if t is not None:
            given |= {**port(name, t), f"{name}_group": H // t.shape[1]}
    given |= {which.upper(): made[which] for which in kernel.outputs}
    given |= {"COLUMNS": columns} if "state" in kernel.outputs else {}
    given |= _shared(kernel, x)
    width = padded(D) if kernel.decay == "channels" else 1
    given |= {"D": D, "DP": padded(D), "E": E, "W": width, "PRECISION": _precision(small)}
    sizes = _sizes(kernel, D, E, small.element_size() * 8, target(x.q))
    while True:
        try:
            blocks = -(-E // sizes["BE"])
            launched(kernel.source, "scan", (B * H, blocks), given | sizes)
            return {which: made[which] for which in kernel.outputs}
        except UnfitError:
            if sizes["T"] == sizes["BE"] == 16:
                raise
            sizes |= {"T": max(16, sizes["T"] // 2), "BE": max(16, sizes["BE"] // 2), "STAGES": 1, "num_stages": 1}


def _shared(kernel: Scan, x: Operands) -> Arguments:
    given: Arguments = {"EPS": kernel.eps} if kernel.sum else {}
    if x.decay is not None:
        given |= port("A", x.decay)
    if x.start is not None:
        given |= port("START", x.start)
    for name, t in (("VALID", x.valid), ("DOCUMENT", x.documents)):
        if t is not None:
            given |= {name: t, f"{name}_b": t.stride(0) if t.shape[0] > 1 else 0, f"{name}_n": t.stride(1)}
    return given


def _sizes(kernel: Scan, D: int, E: int, bits: int, on: str) -> Arguments:
    """Rows of a chunk and channels of a block: what a program's registers hold beside the state."""
    deep = padded(D)
    kind, _, number = on.partition(":")
    rows = 32 if kind == "hip" or deep > 128 or (kernel.sum and deep > 64) else 64
    if deep > 128 and (kind == "hip" or on == "cuda:90"):
        rows = 16
    if kernel.decay in ("channels", "value"):
        rows = 32 if deep <= 64 else 16
    wide = 64 if deep <= 64 and not kernel.sum and not (kind == "cuda" and int(number) < 90) else 32
    if deep > max(D, 64) and rows > 16 and kind == "cuda":  # whether a channel is there costs registers
        wide = 16
    stages = 2 if bits == 16 and deep <= 64 else 1
    warps = 8 if deep >= 64 and kind != "hip" else 4  # there a thread of one of four has twice the registers
    return {"T": rows, "BE": min(padded(E), wide), "STAGES": stages, "num_stages": stages, "num_warps": warps}


def _precision(q: Tensor) -> str:
    """Numbers of 16 bits are multiplied as numbers of 19: a state of float16 would overflow."""
    if q.dtype == torch.float32 or target(q).startswith("hip"):
        return precision(q)
    return "tf32"
