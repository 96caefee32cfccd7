"""`attend` by generated C++: the spec's expressions printed into one loop skeleton, built once, called by pointer."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...compiler.cascades.leftover import leftover
from ...compiler.cost import sizes
from ...compiler.doctor import cpu_flags
from ...compiler.factors import carried
from ...compiler.groups_of_keys import even_groups
from ...compiler.powers import power
from ...compiler.primitives.attend_spec import AttendSpec
from ...compiler.primitives.operator import Groups
from ...compiler.reach import Reach, reach
from ...compiler.refusal import Refused
from ...compiler.symbol_slope import slope
from ...compiler.symbol_text import parse
from ...compiler.symbols import TRUE, Expr
from .. import relative
from ..of_heads import settled, without_sizes
from ..sdpa import refuses_dense
from . import asked
from .memory import Rows, as_dtype, index_of, kinds_of, pointer, step, tables_of, whole_numbers
from .printer import box
from .skeleton import function, of_a_row, skeleton
from .toolchain import NO_COMPILER, built, toolchain

LOG2E = 1 / math.log(2)
_WEIGHTS = {"softmax": "attend_sums.hpp", "sum": "attend_sums.hpp", "none": "attend_sums.hpp",
            "stick": "attend_stick.hpp", "grouped": "attend_groups.hpp"}  # fmt: skip
_POWERS = ("softmax", "stick", "grouped")  # normalisers whose scores are in powers of 2
_ROWS = 48  # query rows of a block: a multiple of every MR
_MOST_OF_A_GROUP = 512  # keys that share a weight of their leader: a tile holds all of them
_MOST_D = 512  # beyond it a block of rows no longer fits the first cache
_LEAST = 1 << 15  # scores of a call; fewer are not worth a library
_LEAST_OF_PLAIN = 1 << 18  # where torch has one call for it, or few rows meet all keys, which are laid out anew
_LEAST_OF_A_WALK = 1 << 14  # where most are not computed
_FEW_ROWS = 16
_SHOWN = 32  # tables of a spec that is shown, before those that loops have in place of sizes
_MOST_PRODUCTS = 1 << 27  # of rows with a relative term's table, held as numbers of float32
_LONG = 1 << 23  # scores from which on these loops are ahead of torch's one call: docs/cpu_kernels.md


class Asked(ctypes.Structure):
    """The skeleton's `Relative`."""

    _fields_ = [("data", ctypes.c_void_p), *[(size, ctypes.c_int64) for size in ("rows", "panels", "heads")]]


class Source(ctypes.Structure):
    _fields_ = [("k", Rows), ("v", Rows), ("Hk", ctypes.c_int64), ("keys", ctypes.c_int64), ("lie", ctypes.c_int64),
                ("at", ctypes.c_void_p), ("at_b", ctypes.c_int64),
                ("at_h", ctypes.c_int64), ("place", ctypes.c_void_p), ("place_b", ctypes.c_int64),
                ("place_h", ctypes.c_int64)]  # fmt: skip


@lru_cache(maxsize=8)
def _call_type(segments: int, terms: int) -> Any:
    """The skeleton's `Call`, for a number of segments and of relative terms."""
    fields: list[tuple[str, Any]] = [("q", Rows), ("o", Rows)]
    fields += [(size, ctypes.c_int64) for size in ("B", "H", "N", "D", "Dv", "shift", "threads")]
    fields += [("q_place", ctypes.c_void_p), ("q_place_b", ctypes.c_int64), ("q_place_h", ctypes.c_int64)]
    fields += [("list", ctypes.c_void_p)]
    fields += [(size, ctypes.c_int64) for size in ("list_b", "list_h", "list_q", "listed")]
    fields += [
        ("lse", ctypes.c_void_p),
        ("t", ctypes.c_void_p),
        ("source", Source * segments),
        ("relative", Asked * max(1, terms)),
    ]
    return type("Call", (ctypes.Structure,), {"_fields_": fields})


@lru_cache(maxsize=1024)
def why_not(text: str) -> str | None:
    """Why the skeleton cannot say a spec, whatever the tensors; None where it can."""
    spec = AttendSpec.of(text)
    if spec.normaliser not in _WEIGHTS:
        return f"normaliser {spec.normaliser}"
    if spec.leader and (reason := _ungrouped(spec)) is not None:
        return reason
    if spec.empty:
        return "a score for empty rows"
    if spec.after and not _scales(parse(spec.after)):
        return "weights changed after normalising, and not by a factor"
    if (reason := relative.why_not(spec)) is not None:
        return reason
    if any(output not in ("o", "lse") for output in spec.outputs):
        return f"outputs {', '.join(spec.outputs)}"
    try:
        source(relative.looked_up(text), "f" * 64)
    except Refused as refused:
        return str(refused)
    return None


def source_of(groups: Groups, text: str) -> str:
    """The source that a call runs."""
    groups, text = settled(groups, text)
    (q,), _, tables = groups
    kinds, halves = kinds_of(tables) + "f" * len(AttendSpec.of(text).relative), bfloat_products(q)
    inside = asked.inside(groups, text, halves)
    return source(text if inside else relative.looked_up(text, len(tables)), kinds, halves)


@lru_cache(maxsize=1024)
def source(text: str, tables: str, halves: str = "") -> str:
    """The whole C++ text of a spec; `tables` says of each table whether it holds floats ("f") or whole ones ("i")."""
    terms = AttendSpec.of(text).relative  # made inside the loops: the last tables
    text = relative.looked_up(text, len(tables) - len(terms))
    spec, bound = AttendSpec.of(text), reach(text)
    _, queries, keys = spec.tiles or ("", *_block(text, halves))
    normaliser = list(_WEIGHTS).index(spec.normaliser)
    raised = power_of(spec)
    head = [
        f"enum {{ {', '.join(_WEIGHTS).upper()} }};",
        f"constexpr int BM = {queries}, BN = {keys}, SEGMENTS = {len(spec.segments)}, NORMALISER = {normaliser};",
        f"constexpr bool SINK = {_flag(bool(spec.sink))}, VALUES = {_flag('o' in spec.outputs)};",
        f"constexpr bool AFTER = {_flag(bool(spec.after))}, STOPS = {_flag(leftover(text))};",
        f"constexpr float EPS = {spec.eps!r}f;",
        f"constexpr int RELATIVE = {len(terms)}, TABLES = {len(tables)}, PANEL = {asked.PANEL};",
        asked.said([index for _, index, _ in terms]),
        f"constexpr int POWER = {raised};",
        f"constexpr float RISE = {2 ** (8 / max(1, raised))!r}f;",
        *([f"constexpr int SIZE = {groups.size};"] if (groups := even_groups(spec.leader)) else []),
        reach_said(bound),
        "template <int S> struct Spec;",
        *(_segment(n, keep, score, spec, tables) for n, (keep, score, _) in enumerate(spec.segments)),
        function("vf sink(int b, int h, int i, const Table* t)", scores(spec, parse(spec.sink or "0.0")), "vf", tables),
    ]
    return skeleton(
        "attend_walk.hpp", "attend_keys.hpp", "attend_relative.hpp", _WEIGHTS[spec.normaliser], "attend.cpp",
        said=head, halves=halves
    )  # fmt: skip


@lru_cache(maxsize=1024)
def along(text: str) -> Mapping[int, int]:
    """Of tables the one axis that keys move along: what lies there one behind the other is loaded together."""
    spec, found = AttendSpec.of(text), {}
    said = [spec.after, spec.weight, *(part for keep, score, _ in spec.segments for part in (keep, score))]
    for e in (e for part in said if part for e in parse(part).walk() if e.op == "lookup"):
        axes = [axis for axis, index in enumerate(e.args[1:]) if "j" in index.names]
        if len(axes) == 1:
            found[int(e.args[0][1:])] = axes[0]
    return found


def shown(text: str) -> str:
    """The source for a reader, as if all tables held floats; "" where the skeleton cannot say the spec."""
    text = without_sizes(text, _SHOWN)[0]
    return "" if why_not(text) else source(relative.looked_up(text), "f" * 2 * _SHOWN)


def _ungrouped(spec: AttendSpec) -> str | None:
    """Why weights of two levels cannot be told tile by tile."""
    groups = even_groups(spec.leader)
    if groups is None:
        return "groups that are not blocks of one size with their last key for a leader"
    if groups.size > _MOST_OF_A_GROUP:
        return f"groups of {groups.size} keys, at most {_MOST_OF_A_GROUP}"
    if spec.tiles and spec.tiles[2] % groups.size:
        return f"tiles of {spec.tiles[2]} keys, which cut groups of {groups.size}"
    return "groups over several segments" if spec.more else None


def _block(text: str, halves: str) -> tuple[int, int]:
    """Rows of queries and of keys that are worked on at a time: measured. A band wastes less with few keys; a smaller
    first cache has room for fewer.
    """
    wide = "avx512f" in cpu_flags()
    if groups := even_groups(AttendSpec.of(text).leader):
        return (128 if halves else 2 * _ROWS), keys_of_groups(groups.size, halves)
    if leftover(text):
        return (64, 64) if halves else (_ROWS, 64)  # the fewer keys at a time, the earlier it can stop
    if reach(text).back is not None:
        return (64, 64) if halves else (_ROWS, 64 if wide else 32)
    return (128, 128) if halves else (_ROWS, 128 if wide else 96)


def keys_of_groups(size: int, halves: str = "") -> int:
    """Keys of a tile of whole groups: in bfloat16 a multiple of 32, 0 if there is none; else rather of a vector."""
    known = range(size, _MOST_OF_A_GROUP + 1, size)
    whole = [n for n in known if n % (32 if halves else 16) == 0] or ([] if halves else [*known])
    return max((n for n in whole if n <= 128), default=min(whole, default=0))


def _flag(value: bool) -> str:
    return "true" if value else "false"


def reach_said(bound: Reach) -> str:
    """How far a query's keys can lie from it, for a skeleton."""
    back, ahead = ("INT64_MAX" if far is None else far for far in (bound.back, bound.ahead))
    return f"constexpr int64_t BACK = {back}, AHEAD = {ahead}, SINKS = {bound.sinks};"


def power_of(spec: AttendSpec) -> int:
    """The power that makes the scores' numbers weights, in every segment the same one; 0 of other scores."""
    known = {found[1] if (found := power(parse(score))) else 0 for _, score, _ in spec.segments}
    return known.pop() if spec.normaliser == "softmax" and len(known) == 1 else 0


def _segment(number: int, keep: str, score: str, spec: AttendSpec, tables: str) -> str:
    predicate = parse(keep) if keep else TRUE
    functions = {
        "vf score(vf s, vi j, int64_t n)": (_score(spec, parse(score)), "vf"),
        "vf weight(vf s)": (carried(parse(spec.weight or "exp(s)")), "vf"),
        "vf factor(vi j, int64_t n)": (carried(slope(parse(spec.after or "w"), "w")), "vf"),
        "vi keep(vi j, int64_t n)": (predicate, "vb"),
    }
    boxes = [seen(predicate)]
    if groups := even_groups(spec.leader):
        functions["vi alone(vi j, int64_t n)"] = (groups.alone, "vb")
        boxes.append(seen(groups.alone, "alone_seen"))
    return "template <> " + of_a_row(f"Spec<{number}>", functions, tables, *boxes)


def _scales(after: Expr) -> bool:
    """Whether what a weight w becomes is w times something: it meets its value so, and the sum that divides stays."""
    if after.op == "name":
        return bool(after.args[0] == "w")
    own = [a for a in after.args if isinstance(a, Expr) and "w" in a.names]
    if after.op == "add":
        return len(own) == len(after.args) and all(map(_scales, own))
    above = after.op == "mul" or (after.op == "truediv" and own == [after.args[0]])
    return above and len(own) == 1 and _scales(own[0])


def scores(spec: AttendSpec, e: Expr) -> Expr:
    """A score as the kernels want it: in powers of 2 where only exponentials and logarithms follow."""
    return carried(e, LOG2E if spec.normaliser in _POWERS else 1.0)


def _score(spec: AttendSpec, e: Expr) -> Expr:
    """The same, or the number of which a weight is a power."""
    found = power(e) if power_of(spec) else None
    return carried(found[0]) if found else scores(spec, e)


def seen(predicate: Expr, called: str = "seen") -> str:
    """What a box of queries and keys keeps, for a skeleton."""
    return f"INLINE int {called}(int b, int h, int i0, int i1, int j0, int j1) {{ return {box(predicate)}; }}"


def few(groups: Groups, text: str) -> str | None:
    """Why a call is not handed to the skeleton: nothing would be gained, or it cannot be."""
    (q,), kv, _ = groups
    reason = NO_COMPILER if toolchain() is None else why_not(text)
    plain = q.shape[2] < _FEW_ROWS or refuses_dense(groups, text) is None
    least = _LEAST_OF_A_WALK if leftover(text) else _LEAST_OF_PLAIN if plain else _LEAST
    if reason is None and q.shape[0] * q.shape[1] * q.shape[2] * sum(k.shape[2] for k in kv[::2]) < least:
        return f"fewer than {least} scores"
    return reason or refuses(groups, text)


def ahead(q: Tensor, keys: int, text: str) -> bool:
    """Whether a call that torch has an operator for is better left to the skeleton: long rows of a causal mask."""
    B, H, N, D = sizes(q)
    kind = q.device.type == "cpu" and (q.dtype == torch.float32 or bool(bfloat_products(q)))
    long = B * H * N * keys >= _LONG and reach(text).ahead == 0 and D <= _MOST_D
    return kind and long and toolchain() is not None and why_not(text) is None


def refuses(groups: Groups, text: str) -> str | None:
    """Why these tensors cannot be handed to the skeleton, whatever it would gain."""
    (q,), kv, tables = groups
    reason = NO_COMPILER if toolchain() is None else why_not(text)
    if reason:
        return reason
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{q.dtype}"
    if (spec_tiles := AttendSpec.of(text).tiles) and bfloat_products(q) and spec_tiles[2] % 32:
        return f"tiles of {spec_tiles[2]} keys: bfloat16 is multiplied in multiples of 32"
    largest = max(q.shape[-1], kv[1].shape[-1])
    if largest > _MOST_D:
        return f"a head of {largest}, at most {_MOST_D}"
    if any(table.numel() == 0 or table.ndim > 4 for table in tables):
        return "a table without elements, or of more than four axes"
    spec = AttendSpec.of(text)
    if any(tables[int(rows[1:])].ndim > 3 for rows in spec.rows if rows):
        return "rows of keys of each query's own"
    if spec.tiles and tables[int(spec.tiles[0][1:])].shape[2] * spec.tiles[1] < q.shape[2]:
        return "tiles for fewer queries than there are"
    kinds = kinds_of(tables) + "f" * len(spec.relative)
    if asked.inside(groups, text, bfloat_products(q)):
        return built(source, text, kinds)[1]
    if relative.elements(groups, spec, relative.rows_at_once(groups, text)) > _MOST_PRODUCTS:
        return f"relative terms with more than {_MOST_PRODUCTS} products"
    return built(source, relative.looked_up(text, len(tables)), kinds)[1]


def run(groups: Groups, text: str, halves: str | None = None, heads_inside: bool = False) -> list[Tensor]:
    """The outputs that a spec asks for: o, lse. `heads_inside`: o lies as (B, N, H, Dv)."""
    if asked.inside(groups, text, bfloat_products(groups[0][0]) if halves is None else halves):
        return _run(groups, text, "", heads_inside=heads_inside)
    rows, some = groups[0][0].shape[2], relative.rows_at_once(groups, text)
    if some == rows:
        return _run(*relative.as_tables(groups, text), halves, heads_inside=heads_inside)
    into = relative.rooms(groups, text, some)
    parts = [
        _run(*relative.of_rows(groups, text, first, min(first + some, rows), into), halves, first, len(groups[2]))
        for first in range(0, rows, some)
    ]
    return [torch.cat(part, 2) for part in zip(*parts, strict=True)]


def _run(
    groups: Groups, text: str, halves: str | None, first: int = 0, of_all: int = 0, heads_inside: bool = False
) -> list[Tensor]:
    """Relative terms are tables, or made inside the loops. `first`: where the first query stands, the first row of
    tables from `of_all` on.
    """
    (q,), kv, given = groups
    halves = bfloat_products(q) if halves is None else halves
    if (even := even_groups(AttendSpec.of(text).leader)) and not keys_of_groups(even.size, halves):
        halves = ""
    dtype = torch.bfloat16 if halves else torch.float32
    spec = AttendSpec.of(text)
    named = {f"t{n}": t for n, t in enumerate(given)}
    kept: list[Tensor] = []  # what the call points into stays alive until it returns
    B, H, N, Dv = *q.shape[:3], kv[1].shape[-1]
    o = torch.empty(B, N, H, Dv, dtype=dtype).transpose(1, 2) if heads_inside else torch.empty(B, H, N, Dv, dtype=dtype)
    lse = torch.empty(q.shape[:3]) if "lse" in spec.outputs else None
    terms = [asked.panels(given[int(table[1:])], kept) for table, _, _ in spec.relative]
    kinds = kinds_of(given) + "f" * len(terms)
    tables = tables_of(given, kept, along(relative.looked_up(text, len(given))), room=len(terms))
    for own in tables[of_all:] if first else ():
        own.data, own.size[2] = own.data - 4 * first * own.stride[2], own.size[2] + first
    pairs = enumerate(zip(kv[::2], kv[1::2], strict=True))
    sources = [_source(k, v, spec, n, named, q, dtype, kept) for n, (k, v) in pairs]
    call = _call_type(len(sources), len(terms))()
    call.q, call.o, call.lse = Rows.of(as_dtype(q, dtype, kept)), Rows.of(o), pointer(lse)
    call.B, call.H, call.N, call.D, call.Dv = *q.shape, o.shape[-1]
    call.threads = torch.get_num_threads()
    call.shift = sources[0].keys - q.shape[2] if spec.align == "end" else first
    for number, (rows, size, panels, heads) in enumerate(terms):
        call.relative[number] = Asked(pointer(rows), size, panels, heads)
    call.source, call.t = (Source * len(sources))(*sources), ctypes.cast(tables, ctypes.c_void_p)
    call.q_place, call.q_place_b, call.q_place_h = index_of(named.get(spec.q_positions), kept)
    if spec.tiles:
        lists = whole_numbers(named[spec.tiles[0]], kept)
        call.list, call.listed = pointer(lists), lists.shape[-1]
        call.list_b, call.list_h, call.list_q = (step(lists, axis) for axis in range(3))
    function, _ = built(source, text, kinds, halves)
    if function is None or ((o.numel() or lse is not None) and function(ctypes.byref(call))):
        # no matrix units for this process, or none that the compiler knows
        return _run(groups, text, "", first, of_all, heads_inside)
    found = {"o": o.to(q.dtype), "lse": lse}
    return [found[which] for which in spec.outputs]  # type: ignore[misc]


def bfloat_products(q: Tensor) -> str:
    """ "units" or "dots" where the processor multiplies these numbers as they are, else "": by vectors of float32."""
    if q.dtype != torch.bfloat16:
        return ""
    return "units" if "amx_bf16" in cpu_flags() else "dots" if "avx512_bf16" in cpu_flags() else ""


def _source(
    k: Tensor,
    v: Tensor,
    spec: AttendSpec,
    number: int,
    named: dict[str, Tensor],
    q: Tensor,
    dtype: torch.dtype,
    kept: list[Tensor],
) -> Source:
    rows, places = named.get(spec.rows_of(number)), named.get(spec.segments[number][2])
    if spec.kv_heads:
        k, v = (t.index_select(1, named[spec.kv_heads].long()) for t in (k, v))
    k, v = (as_dtype(t.expand(q.shape[0], *t.shape[1:]), dtype, kept) for t in (k, v))
    own = any(i is not None and i.ndim == 3 and i.shape[1] not in (1, k.shape[1]) for i in (rows, places))
    shared = q.shape[1] // k.shape[1] if own else 1  # an index of its own for each query head: keys of its own as well
    found = Source(k=Rows.of(k), v=Rows.of(v), Hk=k.shape[1] * shared, keys=k.shape[2], lie=shared)
    if rows is not None:
        found.keys = rows.shape[-1]
        found.at, found.at_b, found.at_h = index_of(torch.where(rows < k.shape[2], rows, -1), kept)
    found.place, found.place_b, found.place_h = index_of(places, kept)
    return found
