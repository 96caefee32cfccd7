"""Gradients of `attend` by generated C++: derivatives of score and weight printed into a skeleton of its own."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ...compiler.cascades.leftover import leftover
from ...compiler.factors import carried
from ...compiler.groups_of_keys import even_groups
from ...compiler.primitives.attend_spec import AttendSpec
from ...compiler.primitives.operator import Groups
from ...compiler.primitives.rows import repeat_heads
from ...compiler.reach import reach
from ...compiler.symbol_slope import slope, slope_by
from ...compiler.symbol_text import parse
from ...compiler.symbols import TRUE
from .. import relative
from . import attend
from .memory import Rows, as_dtype, kinds_of, pointer, step, tables_of, whole_numbers
from .printer import learning
from .skeleton import of_a_row, skeleton
from .toolchain import built

_ROWS, _KEYS = 48, 96  # of a tile: multiples of every MR, so that no product has rows left over
_WEIGHTS = {"stick": "attend_backward_stick.hpp", "grouped": "attend_backward_groups.hpp"}  # of a normaliser; else:
_SUMS = "attend_backward_sums.hpp"
_MOST_LEARNED = 1 << 27  # numbers of the gradients of tables, of all threads
_PORTS = ("q", "k", "v", "go", "dq", "dk", "dv")


class Call(ctypes.Structure):
    _fields_ = [*[(port, Rows) for port in _PORTS],
                *[(size, ctypes.c_int64) for size in ("B", "H", "Hk", "N", "M", "D", "Dv", "shift", "threads")],
                *[(kept, ctypes.c_void_p) for kept in ("L", "R", "delta", "list")],
                *[(size, ctypes.c_int64) for size in ("list_b", "list_h", "list_q", "listed")],
                ("t", ctypes.c_void_p)]  # fmt: skip


@lru_cache(maxsize=1024)
def source(text: str, tables: str, learned: tuple[int, ...] = ()) -> str:
    """The whole C++ text of a spec's gradient; those of the tables that learn stand as tables behind all others."""
    spec, bound = AttendSpec.of(text), reach(text)
    score, weight, after = parse(spec.score), parse(spec.weight or "exp(s)"), parse(spec.after or "w")
    factor = slope(after, "w")
    predicate = parse(spec.keep) if spec.keep else TRUE
    groups = even_groups(spec.leader)
    keys = attend.keys_of_groups(groups.size) if groups else _KEYS // 2 if leftover(text) else _KEYS
    _, queries, keys = spec.tiles or ("", _ROWS, keys)
    functions = {
        "vf score(vf s, vi j, int64_t n)": (attend.scores(spec, score), "vf"),
        "vf slope(vf s, vi j, int64_t n)": (carried(slope(score, "s")), "vf"),
        "vi keep(vi j, int64_t n)": (predicate, "vb"),
        "vf weight(vf s)": (carried(weight), "vf"),
        "vf weight_slope(vf s)": (carried(slope(weight, "s")), "vf"),
        "vf factor(vi j, int64_t n)": (carried(factor), "vf"),
    }
    boxes = [attend.seen(predicate)]
    if groups:
        functions["vi alone(vi j, int64_t n)"] = (groups.alone, "vb")
        boxes.append(attend.seen(groups.alone, "alone_seen"))
    places = {number: len(tables) + n for n, number in enumerate(learned)}
    steps = [
        partial(learning, at, places[int(at.args[0][1:])], gain, carried(slope_by(e, at)), tables + "f" * len(learned))
        for gain, e in (("up", score), ("on", factor))
        for at in {part.text: part for part in e.walk() if part.op == "lookup"}.values()
        if int(at.args[0][1:]) in places
    ]
    learns = {"void learn(vf up, vf on, vf s, vi j, int64_t n)": steps}
    return skeleton(
        "attend_walk.hpp",
        "attend_rows.hpp",
        _WEIGHTS.get(spec.normaliser, _SUMS),
        "attend_backward.cpp",
        said=[
            f"constexpr int BM = {queries}, BN = {keys};",
            f"constexpr int LEARNED = {len(tables)}, TABLES = {len(tables) + len(learned)};",
            f"constexpr bool SOFTMAX = {'true' if spec.normaliser == 'softmax' else 'false'};",
            f"constexpr bool LEARNS = {'true' if steps else 'false'};",
            *([f"constexpr int SIZE = {groups.size};"] if groups else []),
            attend.reach_said(bound),
            of_a_row("Spec", functions, tables, *boxes, steps=learns),
        ],
    )


def gradients(
    groups: Groups, text: str, results: Sequence[Tensor], given: Mapping[int, Tensor], wanted: Sequence[int]
) -> Sequence[Tensor | None] | None:
    """Gradients from those of o and lse; None where this skeleton cannot give what is wanted."""
    (q,), kv, tables = groups
    spec = AttendSpec.of(text)
    if spec.more or any(spec.rows) or spec.q_positions or spec.k_positions or attend.refuses(groups, text) is not None:
        return None
    if q.dtype == torch.float16 or (
        spec.normaliser not in ("softmax", "stick", "grouped") and "lse" in [spec.outputs[n] for n in given]
    ):
        return None
    if spec.relative:
        if relative.elements(groups, spec) * torch.get_num_threads() > _MOST_LEARNED:
            return None
        return relative.through_products(gradients, groups, text, results, given, wanted)
    learned = tuple(k - 3 for k in wanted if k > 2)
    if (spec.after and spec.normaliser == "stick") or not all(_can_learn(spec, f"t{n}") for n in learned):
        return None
    if sum(tables[n].numel() for n in learned) * torch.get_num_threads() > _MOST_LEARNED:
        return None
    function, _ = built(source, text, kinds_of(tables), learned)
    if function is None:
        return None
    named = {spec.outputs[n]: g for n, g in given.items()}
    if spec.kv_heads:
        groups, text = _by_query_head(groups, text)
    found = _found(groups, text, dict(zip(spec.outputs, results)), named, learned, function)
    if found is not None and spec.kv_heads:
        heads = tables[int(spec.kv_heads[1:])].long()
        for n, t in enumerate(kv, 1):
            found[n] = t.new_zeros(t.shape, dtype=torch.float32).index_add_(1, heads, found[n].float()).to(t.dtype)
    return None if found is None else [found[k] for k in wanted]


def _can_learn(spec: AttendSpec, table: str) -> bool:
    """Whether what a table holds counts in scores and factors alone, and not within another index."""
    rest = [e for text in (spec.sink, spec.weight, spec.leader) if text for e in parse(text).walk()]
    said = [*parse(spec.score).walk(), *(parse(spec.after).walk() if spec.after else ())]
    rest += [part for e in said if e.op == "lookup" for index in e.args[1:] for part in index.walk()]
    return not any(e.op == "lookup" and e.args[0] == table for e in rest)


def _by_query_head(groups: Groups, text: str) -> tuple[Groups, str]:
    """The call with a key head of each query head's own in the place of a table that says which."""
    (q,), kv, tables = groups
    spec = AttendSpec.of(text)
    heads = tables[int(spec.kv_heads[1:])].long()
    return [[q], [t.index_select(1, heads) for t in kv], list(tables)], replace(spec, kv_heads="").text


def _found(
    groups: Groups,
    text: str,
    results: dict[str, Tensor],
    given: Mapping[str, Tensor],
    learned: Sequence[int],
    function: Any,
) -> dict[int, Tensor] | None:
    """Gradients of q, k, v and the tables that learn, by their place in the call."""
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
    sums = [torch.zeros(call.threads, *tables[n].shape) for n in learned]  # of each thread
    kept += sums
    named = tables_of([*tables, *(t[0] for t in sums)], kept, attend.along(text))
    call.t = ctypes.cast(named, ctypes.c_void_p)
    if spec.tiles:
        lists = whole_numbers(tables[int(spec.tiles[0][1:])], kept)
        call.list, call.listed = pointer(lists), lists.shape[-1]
        call.list_b, call.list_h, call.list_q = (step(lists, axis) for axis in range(3))
    function(ctypes.byref(call))
    shapes = (groups[0][0].shape, groups[1][0].shape, groups[1][1].shape)
    found = {n: g.sum_to_size(shape).to(q.dtype) for n, (g, shape) in enumerate(zip(made, shapes, strict=True))}
    return found | {3 + n: t.sum(0) for n, t in zip(learned, sums, strict=True)}


def _rows(
    spec: AttendSpec, o: Tensor, lse: Tensor, given: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """L, R and delta of every row (B, H, N); None where a sum of weights is negative, whose logarithm is unknown."""
    delta = (o * given["o"].float()).sum(-1) if "o" in given else torch.zeros_like(lse)
    if "lse" in given:
        delta = delta - given["lse"]
    match spec.normaliser:
        case "softmax" | "grouped":
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
