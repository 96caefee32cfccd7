"""A `prefix` by generated C++: one walk along the rows, and for gradients another walk back."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from ...compiler.primitives.operator import Groups
from ...compiler.primitives.prefix_spec import MONOIDS, PrefixSpec
from ...compiler.primitives.scan_meaning import in_order
from .memory import Rows, as_dtype, pointer, step, whole_numbers
from .skeleton import skeleton
from .toolchain import built

_LEAST = 1 << 14  # numbers of a call; fewer are not worth a library of their own
_whole, _address = ctypes.c_int64, ctypes.c_void_p


class Call(ctypes.Structure):
    _fields_ = [*[(rows, Rows) for rows in ("x", "a", "o", "lse")],
                *[(size, _whole) for size in ("B", "H", "N", "D", "threads")],
                ("document", _address), ("document_b", _whole), ("document_n", _whole)]  # fmt: skip


@lru_cache(maxsize=16)
def source(monoid: str) -> str:
    """The whole C++ text of a monoid."""
    names = ", ".join(each.upper() for each in MONOIDS)
    return skeleton("prefix.cpp", said=[f"enum {{ {names} }};", f"constexpr int MONOID = {monoid.upper()};"])


def few(groups: Groups, text: str) -> str | None:
    """Why a call is not handed to the skeleton: nothing would be gained, or it cannot be."""
    return "few rows" if groups[0][-1].numel() < _LEAST else refuses(groups, text)


def refuses(groups: Groups, text: str) -> str | None:
    """Why these tensors cannot be handed to the skeleton, whatever it would gain."""
    x = groups[0][-1]
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{x.dtype}"
    return built(source, PrefixSpec.of(text).monoid)[1]


def run(groups: Groups, text: str) -> list[Tensor]:
    """The prefixes; for a softmax the logarithms of its sums too."""
    rows, tables = groups
    spec, x = PrefixSpec.of(text), rows[-1]
    kept: list[Tensor] = []  # what the call points into stays alive until it returns
    o, lse = torch.empty(x.shape), torch.empty(x.shape[:3])
    B, H, N, D = x.shape
    call = Call(B=B, H=H, N=N, D=D, threads=torch.get_num_threads())
    call.x, call.o = _rows(as_dtype(x, torch.float32, kept), spec), _rows(o, spec)
    if len(rows) == 2:
        a = as_dtype(rows[0] if rows[0].ndim == 4 else rows[0][..., None], torch.float32, kept)
        call.a, call.lse = (
            _rows(a.expand(B, H, N, D if spec.monoid == "affine" else 1), spec),
            _rows(lse[..., None], spec),
        )
    if spec.documents:
        ids = whole_numbers(in_order(tables[int(spec.documents[1:])])[:, 0], kept)
        call.document_b, call.document_n = step(ids, 0), -1 if spec.reverse else 1
        call.document = pointer(ids) + ids.element_size() * (N - 1 if spec.reverse else 0)
    if x.numel():
        built(source, spec.monoid)[0](ctypes.byref(call))
    return [o.to(x.dtype), lse] if spec.monoid == "softmax" else [o.to(x.dtype)]


def _rows(t: Tensor, spec: PrefixSpec) -> Rows:
    """Where rows lie; from the last one backwards where they are combined in that order."""
    found = Rows.of(t)
    if spec.reverse and t.shape[2]:
        found.data = t.data_ptr() + t.element_size() * (t.shape[2] - 1) * t.stride(2)
        found.n = -t.stride(2)
    return found


def gradients(
    groups: Groups, text: str, results: Sequence[Tensor], given: Mapping[int, Tensor], wanted: Sequence[int]
) -> Sequence[Tensor | None] | None:
    """Of every tensor that is wanted: a prefix is linear in its rows, so that its gradient is one in reverse."""
    spec, (rows, tables) = PrefixSpec.of(text), groups
    back = replace(spec, monoid="affine", reverse=not spec.reverse)
    if spec.monoid == "max":
        return None
    wide = [t.float() for t in rows]
    if spec.monoid == "softmax":
        found = _of_softmax(wide, results, given, back, tables)
    elif spec.monoid == "affine":
        found = _of_affine(wide, results[0].float(), given[0].float(), back, tables)
    else:
        found = run([[given[0]], tables], replace(back, monoid="sum").text)
    return [found[k] for k in wanted]


def _of_affine(rows: list[Tensor], y: Tensor, g: Tensor, back: PrefixSpec, tables: Sequence[Tensor]) -> list[Tensor]:
    """g'_t = g_t + a_{t+1} g'_{t+1} is x's; g'_t y_{t-1} is a's, 0 where nothing came before."""
    a, x = rows
    turn = 1 if back.reverse else -1  # a row's neighbour before it, as the rows were walked
    (gx,) = run([[a.roll(-turn, 2), g], tables], back.text)
    before = torch.where(_begins(x, back, tables), 0.0, y.roll(turn, 2))
    ga = gx * before
    return [ga.sum(3, keepdim=True) if a.shape[3] < x.shape[3] else ga, gx]


def _of_softmax(
    rows: list[Tensor],
    results: Sequence[Tensor],
    given: Mapping[int, Tensor],
    back: PrefixSpec,
    tables: Sequence[Tensor],
) -> list[Tensor]:
    """With p = exp(l - lse) and G_s = sum_{t >= s} exp(lse_s - lse_t) (do_t, do_t . o_t - dlse_t), itself an affine
    prefix in reverse: dv = p G, dl = p (v . G - G's last channel).
    """
    logits, v = rows
    o, lse = results[0].float(), results[1]
    some = lse > -torch.inf
    do = given[0].float() if 0 in given else torch.zeros_like(v)
    last = (do * o).sum(3) - given.get(1, 0.0)
    g = torch.where(some[..., None], torch.cat((do, last[..., None]), 3), 0.0)
    later = lse.roll(1 if not back.reverse else -1, 2)
    factors = torch.where(some, torch.exp(lse - later), 0.0)
    (summed,) = run([[factors[..., None], g], tables], back.text)
    p = torch.where(some, torch.exp(logits - lse), 0.0)
    dl = p * ((v * summed[..., :-1]).sum(3) - summed[..., -1])
    return [dl, p[..., None] * summed[..., :-1]]


def _begins(x: Tensor, back: PrefixSpec, tables: Sequence[Tensor]) -> Tensor:
    """Which rows had nothing before them, (B|1, 1, N, 1)."""
    first = -1 if not back.reverse else 0
    found = torch.zeros(1, 1, x.shape[2], dtype=torch.bool)
    if back.documents:
        ids = in_order(tables[int(back.documents[1:])])
        found = ids != ids.roll(1 if back.reverse else -1, -1)
    found[..., first] = True
    return found[..., None]
