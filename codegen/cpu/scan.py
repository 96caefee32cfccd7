"""A causal `scan` by generated C++: features printed into one loop skeleton whose state stays in the first cache."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from ...compiler.primitives.operator import Groups
from ...compiler.primitives.scan_meaning import in_order
from ...compiler.primitives.scan_spec import ScanSpec
from ...compiler.symbol_text import parse
from ...compiler.symbols import name
from .memory import Rows, as_dtype, pointer, step, whole_numbers
from .skeleton import function, skeleton
from .toolchain import built

_CHUNK = 16
_MOST = 1 << 20  # numbers of a state, and of what a chunk is worked on in: the next cache holds them
_LEAST = 1 << 20  # products with the state of a call; fewer are not worth a library of their own
_whole, _address = ctypes.c_int64, ctypes.c_void_p


class Call(ctypes.Structure):
    _fields_ = [*[(rows, Rows) for rows in ("q", "k", "v", "o", "decay", "start")],
                *[(size, _whole) for size in ("B", "H", "group", "N", "D", "Dv", "threads")],
                ("document", _address), ("document_b", _whole), ("valid", _address), ("valid_b", _whole),
                ("state", _address), ("norm", _address)]  # fmt: skip


@lru_cache(maxsize=1024)
def source(text: str, channels: bool, halves: str = "") -> str:
    """The whole C++ text of a spec."""
    spec = ScanSpec.of(text)
    flags = {"DECAYS": bool(spec.decay), "CHANNELS": channels, "LOGS": spec.log_decay, "SUM": spec.normaliser == "sum",
             "BEFORE": spec.read == "before"}  # fmt: skip
    head = [
        f"constexpr int T = {_CHUNK};",
        f"constexpr float EPS = {spec.eps!r}f;",
        *(f"constexpr bool {flag} = {'true' if value else 'false'};" for flag, value in flags.items()),
        *(
            function(f"vf feature_{side}(vf x)", parse(feature) if feature else name("x"), "vf")
            for side, feature in (("q", spec.feature_q), ("k", spec.feature_k))
        ),
    ]
    return skeleton("scan.cpp", said=head, halves=halves)


def source_of(groups: Groups, text: str) -> str:
    """The source that a call runs."""
    return source(text, *_kind(groups, ScanSpec.of(text)))


def _kind(groups: Groups, spec: ScanSpec) -> tuple[bool, str]:
    """Whether every channel has a decay of its own; whether the tensors are read as they are, in bfloat16."""
    (q,), _, tables = groups
    channels = bool(spec.decay) and tables[int(spec.decay[1:])].shape[-1] > 1
    return channels, "vectors" if q.dtype == torch.bfloat16 else ""


def few(groups: Groups, text: str) -> str | None:
    """Why a call is not handed to the skeleton: nothing would be gained, or it cannot be."""
    (q,), (_, v), _ = groups
    if q.numel() * v.shape[-1] < _LEAST:
        return "few rows"
    return refuses(groups, text)


def refuses(groups: Groups, text: str) -> str | None:
    """Why these tensors cannot be handed to the skeleton, whatever it would gain."""
    (q,), (_, v), _ = groups
    spec = ScanSpec.of(text)
    if not spec.causal:
        return "rows that read what comes after them"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{q.dtype}"
    if q.shape[-1] * v.shape[-1] > _MOST:
        return f"a state of {q.shape[-1]} x {v.shape[-1]}, at most {_MOST} numbers"
    return built(source, text, *_kind(groups, spec))[1]


def run(groups: Groups, text: str) -> list[Tensor]:
    """The outputs that a spec asks for: o, state, norm."""
    (q,), (k, v), given = groups
    spec = ScanSpec.of(text)
    named = {f"t{n}": t for n, t in enumerate(given)}
    B, H, N, D = q.shape
    Dv, extra = v.shape[-1], spec.normaliser == "sum"
    kept: list[Tensor] = []  # what the call points into stays alive until it returns
    dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
    sizes = {"o": (B, H, N, Dv), "state": (B, H, D, Dv + extra), "norm": (B, H, N)}
    made = {
        which: torch.empty(sizes[which], dtype=dtype if which == "o" else torch.float32)
        for which in dict.fromkeys(("o", *spec.outputs))
    }
    call = Call(B=B, H=H, group=H // k.shape[1], N=N, D=D, Dv=Dv, threads=torch.get_num_threads())
    call.q, call.o = Rows.of(as_dtype(q, dtype, kept)), Rows.of(made["o"])
    keys = [as_dtype(t, dtype, kept) for t in (k, v)]
    call.k, call.v = (Rows.of(t if t.shape[0] == B else t.expand(B, *t.shape[1:])) for t in keys)
    decay = named.get(spec.decay)
    if decay is not None:
        call.decay = _spread(decay, (B, H, N, decay.shape[-1]), q, kept)
    if spec.state:
        call.start = _spread(named[spec.state], (B, H, D, Dv + extra), q, kept)
    if spec.documents:
        ids = whole_numbers(in_order(named[spec.documents])[:, 0], kept)
        call.document, call.document_b = pointer(ids), step(ids, 0)
    if spec.valid:
        valid = whole_numbers(named[spec.valid].reshape(-1, N) != 0, kept)
        call.valid, call.valid_b = pointer(valid), step(valid, 0)
    call.state, call.norm = (pointer(made.get(which)) or None for which in ("state", "norm"))
    if B * H * D * (Dv + extra):
        built(source, text, *_kind(groups, spec))[0](ctypes.byref(call))
    made["o"] = made["o"].to(q.dtype)
    return [made[which] for which in spec.outputs]


def _spread(t: Tensor, sizes: tuple[int, ...], q: Tensor, kept: list[Tensor]) -> Rows:
    """Strides of a tensor as if it had those sizes; heads of keys are repeated for the query heads that share them."""
    if t.shape[1] not in (1, q.shape[1]):
        t = t.repeat_interleave(q.shape[1] // t.shape[1], 1)
    return Rows.of(as_dtype(t, torch.float32, kept).expand(sizes))
