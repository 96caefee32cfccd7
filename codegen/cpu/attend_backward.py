"""Gradients of `attend` by generated C++: derivatives of score and weight printed into a skeleton of its own."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...compiler.cascades.leftover import leftover
from ...compiler.factors import carried
from ...compiler.primitives.attend_spec import AttendSpec
from ...compiler.primitives.operator import Groups
from ...compiler.primitives.rows import repeat_heads
from ...compiler.reach import reach
from ...compiler.symbol_slope import slope
from ...compiler.symbol_text import parse
from ...compiler.symbols import TRUE
from . import attend
from .memory import Rows, as_dtype, kinds_of, pointer, step, tables_of, whole_numbers
from .skeleton import of_a_row, skeleton
from .toolchain import built

_ROWS, _KEYS = 48, 96  # of a tile: multiples of every MR, so that no product has rows left over
_WEIGHTS = {"stick": "attend_backward_stick.hpp"}  # of a normaliser; else:
_SUMS = "attend_backward_sums.hpp"
_PORTS = ("q", "k", "v", "go", "dq", "dk", "dv")


class Call(ctypes.Structure):
    _fields_ = [*[(port, Rows) for port in _PORTS],
                *[(size, ctypes.c_int64) for size in ("B", "H", "Hk", "N", "M", "D", "Dv", "shift", "threads")],
                *[(kept, ctypes.c_void_p) for kept in ("L", "R", "delta", "list")],
                *[(size, ctypes.c_int64) for size in ("list_b", "list_h", "list_q", "listed")],
                ("t", ctypes.c_void_p)]  # fmt: skip


@lru_cache(maxsize=1024)
def source(text: str, tables: str) -> str:
    """The whole C++ text of a spec's gradient."""
    spec, bound = AttendSpec.of(text), reach(text)
    score, weight = parse(spec.score), parse(spec.weight or "exp(s)")
    predicate = parse(spec.keep) if spec.keep else TRUE
    _, queries, keys = spec.tiles or ("", _ROWS, _KEYS // 2 if leftover(text) else _KEYS)
    functions = {
        "vf score(vf s, vi j, int64_t n)": (attend.scores(spec, score), "vf"),
        "vf slope(vf s, vi j, int64_t n)": (carried(slope(score, "s")), "vf"),
        "vi keep(vi j, int64_t n)": (predicate, "vb"),
        "vf weight(vf s)": (carried(weight), "vf"),
        "vf weight_slope(vf s)": (carried(slope(weight, "s")), "vf"),
    }
    return skeleton(
        "attend_walk.hpp",
        "attend_rows.hpp",
        _WEIGHTS.get(spec.normaliser, _SUMS),
        "attend_backward.cpp",
        said=[
            f"constexpr int BM = {queries}, BN = {keys};",
            f"constexpr bool SOFTMAX = {'true' if spec.normaliser == 'softmax' else 'false'};",
            attend.reach_said(bound),
            of_a_row("Spec", functions, tables, attend.seen(predicate)),
        ],
    )


def gradients(
    groups: Groups, text: str, results: Sequence[Tensor], given: Mapping[int, Tensor], wanted: Sequence[int]
) -> Sequence[Tensor | None] | None:
    """Gradients of q, k, v from those of o and lse; None where this skeleton cannot give what is wanted."""
    (q,), kv, tables = groups
    spec = AttendSpec.of(text)
    plain = not (
        spec.after
        or spec.leader
        or spec.relative
        or spec.more
        or any(spec.rows)
        or spec.q_positions
        or spec.k_positions
        or spec.kv_heads
    )
    if not plain or any(k > 2 for k in wanted) or attend.refuses(groups, text) is not None:
        return None
    if q.dtype == torch.float16 or (
        spec.normaliser not in ("softmax", "stick") and "lse" in [spec.outputs[n] for n in given]
    ):
        return None
    function, _ = built(source, text, kinds_of(tables))
    named = {spec.outputs[n]: g for n, g in given.items()}
    found = None if function is None else _found(groups, text, dict(zip(spec.outputs, results)), named, function)
    return None if found is None else [found[k] for k in wanted]


def _found(
    groups: Groups, text: str, results: dict[str, Tensor], given: Mapping[str, Tensor], function: Any
) -> list[Tensor] | None:
    (q,), (k, v), tables = groups
    spec = AttendSpec.of(text)
    kept: list[Tensor] = []  # what the call points into stays alive until it returns
    if spec.normaliser == "stick":  # what is behind a key is told from all of o: a rounded one would say little of it
        results = {"o": results["o"]} if "o" in results and q.dtype == torch.float32 else {}
        groups = [[t.float() for t in group] for group in groups[:2]] + [groups[2]]
    needed = ("o",) if spec.normaliser == "stick" else ("o", "lse")
    if missing := tuple(which for which in needed if which not in results):
        results |= dict(zip(missing, attend.run(groups, replace(spec, outputs=missing).text), strict=True))
    o = results["o"].float()
    rows = _taken(o, v, given) if spec.normaliser == "stick" else _rows(spec, o, results["lse"], given)
    if rows is None:
        return None
    wide = q.shape[0]
    k, v = (t.expand(wide, *t.shape[1:]) for t in (k, v))
    go = given["o"] if "o" in given else torch.zeros_like(o)
    ports = [as_dtype(t, torch.float32, kept) for t in (q, k, v, go)]
    made = [torch.empty(t.shape) for t in ports[:3]]
    call = Call(**{port: Rows.of(t) for port, t in zip(_PORTS, (*ports, *made), strict=True)})
    call.B, call.H, call.N, call.D = q.shape
    call.Hk, call.M, call.Dv = k.shape[1], k.shape[2], v.shape[-1]
    call.threads, call.shift = torch.get_num_threads(), k.shape[2] - q.shape[2] if spec.align == "end" else 0
    kept += [t.contiguous() for t in rows]
    call.L, call.R, call.delta = (pointer(t) for t in kept[-3:])
    named = tables_of(tables, kept, attend.along(text))
    call.t = ctypes.cast(named, ctypes.c_void_p)
    if spec.tiles:
        lists = whole_numbers(tables[int(spec.tiles[0][1:])], kept)
        call.list, call.listed = pointer(lists), lists.shape[-1]
        call.list_b, call.list_h, call.list_q = (step(lists, axis) for axis in range(3))
    function(ctypes.byref(call))
    shapes = (groups[0][0].shape, groups[1][0].shape, groups[1][1].shape)
    return [grad.sum_to_size(shape).to(q.dtype) for grad, shape in zip(made, shapes, strict=True)]


def _rows(
    spec: AttendSpec, o: Tensor, lse: Tensor, given: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """L, R and delta of every row (B, H, N); None where a sum of weights is negative, whose logarithm is unknown."""
    delta = (o * given["o"].float()).sum(-1) if "o" in given else torch.zeros_like(lse)
    if "lse" in given:
        delta = delta - given["lse"]
    match spec.normaliser:
        case "softmax":
            return lse / math.log(2), torch.ones_like(lse), delta
        case "none":
            return lse, torch.ones_like(lse), torch.zeros_like(lse)
    if bool(lse.isnan().any()):
        return None
    divisor = lse.exp() + spec.eps
    return lse, 1 / torch.where(divisor != 0, divisor, 1.0), delta


def _taken(o: Tensor, v: Tensor, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The same of weights taken from what is left: L is its gradient, R no less than any do . v."""
    none = o.new_zeros(o.shape[:-1])
    go = given["o"].float() if "o" in given else torch.zeros_like(o)
    longest = repeat_heads(v.float().norm(dim=-1, keepdim=True).amax(2, keepdim=True), o)[..., 0]
    return given.get("lse", none).float(), go.norm(dim=-1) * longest, (o * go).sum(-1)
