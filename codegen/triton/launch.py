"""`attend` on a GPU: a call's tensors handed to the kernel of its spec."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...compiler.primitives.attend_grouped import groups_of, table_of
from ...compiler.primitives.attend_meaning import attend_meaning
from ...compiler.primitives.attend_spec import AttendSpec
from ...compiler.primitives.attend_stored import rows_of, widths
from ...compiler.primitives.operator import Groups
from ...compiler.primitives.rows import repeat_heads
from .. import relative
from .arguments import Arguments, index, kinds, looked_up, named, port
from .attend import Attend, aligned, tables_in, why_not
from .blocks import Blocks, forward_blocks, padded, smaller, stored_blocks
from .launch_shares import in_shares, shares_of
from .launching import UnfitError, launched, precision, target, unfit

log = logging.getLogger("reattend")
_MOST_D = 256
_MOST_TABLE = 1 << 31  # elements that an offset of 32 bits reaches
_MOST_STEP = 1 << 24  # from one row to the next: those of a block of 128 lie within an offset of 32 bits
_MOST_LISTED = 128  # keys or queries of a listed tile that is not cut into blocks


def refuses(groups: Groups, text: str) -> str | None:
    """Why a call is not handed to the kernel."""
    (q,), kv, tables = groups
    reason = unfit(groups) or why_not(text)
    if reason:
        return reason
    spec = AttendSpec.of(text)
    stored = rows_of(kv, spec)
    if any(q.dtype != (getattr(torch, rows.dtype) if rows else t.dtype) for t, rows in zip(kv, stored, strict=True)):
        return "keys or values of another dtype than the queries"
    if any(rows and not _lies_together(t, aligned(rows)) for t, rows in zip(kv, stored)):
        return "rows whose bytes do not lie together"
    widest = max(q.shape[-1], *widths(kv, spec))
    if widest > _MOST_D:
        return f"a head of {widest}, at most {_MOST_D}"
    if any(t.numel() == 0 or t.numel() >= _MOST_TABLE for t in tables):
        return "a table without elements, or of more than 2 ** 31"
    if relative.elements(groups, spec) >= _MOST_TABLE:
        return "relative terms with more than 2 ** 31 products"
    if any(tables[int(rows[1:])].ndim > 3 for rows in spec.rows if rows):
        return "rows of keys of each query's own"
    if q.numel() == 0 or kv[1].shape[-1] == 0 or not all(k.shape[2] for k in kv[::2]):
        return "no rows"
    if any(t.shape[2] > 1 and t.stride(2) >= _MOST_STEP for t in (q, *kv)):
        return "rows that lie 2 ** 24 numbers apart"
    return _tiles_refused(spec, groups)


def _lies_together(rows: Tensor, by: int) -> bool:
    steps = [step for size, step in zip(rows.shape[:-1], rows.stride()[:-1]) if size > 1]
    return rows.stride(-1) == 1 and not any(step % by for step in (*steps, rows.storage_offset()))


def _tiles_refused(spec: AttendSpec, groups: Groups) -> str | None:
    if not spec.tiles:
        return None
    table, queries, keys = spec.tiles
    if groups[2][int(table[1:])].shape[2] * queries < groups[0][0].shape[2]:
        return "tiles for fewer queries than there are"
    if _block(queries, 128) is None or _block(keys, 64) is None:
        return f"tiles of {queries} x {keys}"
    if AttendSpec.of(spec.text).normaliser == "stick":
        return "listed tiles have no order"
    return None


def _block(size: int, most: int) -> tuple[int, int] | None:
    """(rows of a block, blocks of a tile): a block is a power of two that divides the tile, or holds it."""
    fitting = [b for b in (128, 64, 32, 16) if b <= most and size % b == 0]
    if fitting:
        return fitting[0], size // fitting[0]
    return (padded(size), 1) if size <= _MOST_LISTED else None


def run(
    groups: Groups, text: str, *, keeps: bool = False, blocks: Blocks | None = None, shares: int = 0
) -> list[Tensor]:
    """The outputs that a spec asks for; with `keeps` also each row's number for its gradient.

    `shares`: among how many programs the keys of a block of rows are divided, 0: as the roofline has it.
    Blocks that a device has no room for become smaller; a device without room for the smallest runs the plain meaning.
    """
    groups, text = relative.as_tables(groups, text)
    chosen = blocks or _blocks(groups, text)
    shares = shares or shares_of(groups, text, chosen, _rows(groups, text))
    for tried in (chosen, *smaller(chosen)):
        try:
            return _run(groups, text, keeps, tried, shares)
        except UnfitError as error:
            log.info("attend in blocks of %d x %d: %s", tried.rows, tried.keys, error)
    if keeps:
        raise UnfitError("a block of 16 x 16")
    return attend_meaning(groups, text)


def _blocks(groups: Groups, text: str) -> Blocks:
    (q,), kv, _ = groups
    spec = AttendSpec.of(text)
    sizes = q.shape[-1], widths(kv, spec)[1], _rows(groups, text), q.element_size() * 8
    found = forward_blocks(*sizes, target(q))
    return stored_blocks(found, target(q)) if spec.stored else found


def _rows(groups: Groups, text: str) -> int:
    """How many rows share the keys of a head."""
    (q,), kv, _ = groups
    return q.shape[2] * (q.shape[1] // kv[0].shape[1] if _packs(AttendSpec.of(text), groups) else 1)


def _run(groups: Groups, text: str, keeps: bool, blocks: Blocks, shares: int) -> list[Tensor]:
    (q,), kv, tables = groups
    spec = AttendSpec.of(text)
    singly = bool(spec.stored) and target(q).startswith("hip")
    lazily = not target(q).startswith("cuda:10")  # there Triton 3.6 makes no code of a product behind a branch
    kernel = Attend(text, kinds(tables), _packs(spec, groups), keeps, singly, lazily)
    heads, group = q.shape[1], q.shape[1] // kv[0].shape[1] if not spec.kv_heads else 1
    step, parts, wide, blocks = steps(spec.tiles, blocks)
    E = widths(kv, spec)[1]
    made = _results(kernel, q, E)
    given: Arguments = {**port("Q", q), "H": heads, "N": q.shape[2]} | ({"G": group} if kernel.packed else {})
    for number, (k, v) in enumerate(zip(kv[::2], kv[1::2], strict=True)):
        given |= _segment(kernel, number, k, v, q, named(groups))
    given |= _placed(spec, q, kv, named(groups), parts)
    for number in tables_in(spec):
        given |= looked_up(number, tables[number])
    given |= {"D": q.shape[-1], "DP": padded(q.shape[-1]), "E": E, "EP": padded(E)}
    given |= {"BM": blocks.rows, "BN": blocks.keys, "STEP": step, "WIDE": wide, "STAGES": blocks.stages}
    given |= {"PRECISION": precision(q), "num_warps": blocks.warps, "num_stages": blocks.stages}
    programs = -(-_rows(groups, text) // step) * q.shape[0] * (kv[0].shape[1] if kernel.packed else heads)
    if shares > 1:
        in_shares(kernel, given, made, programs, shares)
    else:
        launched(kernel.source, kernel.name, (programs,), given | made)
    found = {"o": made.get("O"), "lse": made.get("LSE")}
    return [found[which] for which in spec.outputs] + ([made["KEPT"]] if "KEPT" in made else [])


def _packs(spec: AttendSpec, groups: Groups) -> bool:
    """Whether query heads share a block: where nothing but the queries themselves tells them apart."""
    (q,), kv, tables = groups
    if spec.kv_heads or spec.tiles or any(k.shape[1] != kv[0].shape[1] for k in kv[::2]):
        return False
    heads = [tables[int(rows[1:])].shape[1] for rows in spec.rows if rows]
    heads += [tables[int(at[1:])].shape[1] for _, _, at in spec.segments if at and tables[int(at[1:])].ndim == 3]
    return q.shape[1] > kv[0].shape[1] and all(count in (1, kv[0].shape[1]) for count in heads)


def steps(tiles: tuple[str, int, int] | tuple[()], blocks: Blocks) -> tuple[int, int, int, Blocks]:
    """Rows from one block to the next, blocks of keys in a listed tile, keys from one to the next, the blocks."""
    if not tiles:
        return blocks.rows, 1, blocks.keys, blocks
    _, queries, keys = tiles
    (rows, parts_q), (wide, parts) = _block(queries, blocks.rows) or (0, 0), _block(keys, blocks.keys) or (0, 0)
    fitted = replace(blocks, rows=rows, keys=wide)
    return (
        (rows if parts_q > 1 or rows == queries else queries),
        parts,
        (wide if wide * parts == keys else keys),
        fitted,
    )


def _results(kernel: Attend, q: Tensor, E: int) -> Arguments:
    made: Arguments = {}
    if kernel.values:
        made["O"] = q.new_empty(*q.shape[:3], E)
    if "lse" in kernel.spec.outputs:
        made["LSE"] = q.new_empty(q.shape[:3], dtype=torch.float32)
    if kernel.keeps and kernel.folding.kept:
        made["KEPT"] = q.new_empty(q.shape[:3], dtype=torch.float32)
    return made


def _segment(kernel: Attend, number: int, k: Tensor, v: Tensor, q: Tensor, tables: Any) -> Arguments:
    spec = kernel.spec
    table = None if number else table_of(spec, list(tables.values()))
    if table is None:
        k, v = (t.expand(q.shape[0], *t.shape[1:]) for t in (k, v))
    rows, places = tables.get(spec.rows_of(number)), tables.get(spec.segments[number][2])
    given: Arguments = {**port(f"K{number}", k), **port(f"V{number}", v), f"M{number}": k.shape[2]}
    given |= {} if kernel.packed or spec.kv_heads else {f"G{number}": q.shape[1] // k.shape[1]}
    if table is not None:
        given |= {"group": table, "group_b": table.stride(0), "group_n": table.stride(1), "TABLED": table.shape[0]}
        given |= {"GROUPS": groups_of(q, k), "LAST": k.shape[2], f"M{number}": table.shape[1]}
    if rows is not None:
        rows = torch.where(rows < k.shape[2], rows, -1)
        given |= {
            **index(f"row_k{number}", rows if kernel.packed else of_heads(rows, q, k)),
            f"M{number}": rows.shape[-1],
        }
    if places is not None:
        given |= index(f"at_k{number}", places if kernel.packed else of_heads(places, q, k))
    return given


def of_heads(t: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """An index with heads of keys, for every query head."""
    shared = t.ndim == 3 and t.shape[1] == k.shape[1] != q.shape[1] and t.shape[1] > 1
    return repeat_heads(t, q) if shared else t


def _placed(spec: AttendSpec, q: Tensor, kv: Any, tables: Any, parts: int) -> Arguments:
    """Where queries stand, which head of keys they read, which tiles."""
    given: Arguments = {"shift": kv[0].shape[2] - q.shape[2] if spec.align == "end" else 0}
    if spec.q_positions:
        given |= index("at_q", tables[spec.q_positions])
    if spec.kv_heads:
        given["kv_heads"] = tables[spec.kv_heads].clamp(0, kv[0].shape[1] - 1)
    return given | listing(spec, tables, kv[0].shape[2], parts)


def listing(spec: AttendSpec, tables: Any, keys: int, parts: int, *, turned: bool = False) -> Arguments:
    """The tiles of keys that are listed for each tile of queries; `turned`: those of queries, for each tile of keys."""
    if not spec.tiles:
        return {}
    name, rows, width = spec.tiles
    table, tiles = tables[name], -(-keys // width)
    if turned:
        table, tiles, rows = _turned(table, tiles), table.shape[2], width
    lists, counts = _in_order(table, tiles)
    steps = [0 if size == 1 else step for size, step in zip(counts.shape, counts.stride(), strict=True)]
    given: Arguments = {"LIST": lists, "COUNT": counts, "list_b": steps[0], "list_h": steps[1], "TILES": rows}
    return given | {"LISTED": lists.shape[-1], "PARTS": parts}


def _turned(table: Tensor, tiles: int) -> Tensor:
    """For each of so many tiles of keys, the tiles of queries whose list has it."""
    listed = torch.where((table >= 0) & (table < tiles), table, tiles)
    seen = torch.zeros(*table.shape[:3], tiles + 1, dtype=torch.bool, device=table.device)
    seen = seen.scatter(-1, listed.long(), torch.ones_like(listed, dtype=torch.bool))[..., :tiles]
    return torch.where(seen.mT, torch.arange(table.shape[2], device=table.device), -1)


def _in_order(table: Tensor, tiles: int) -> tuple[Tensor, Tensor]:
    """Each list's tiles in order, none twice, and how many they are."""
    wanted = torch.where((table >= 0) & (table < tiles), table, tiles).sort(-1).values
    fresh = torch.ones_like(wanted, dtype=torch.bool)
    fresh[..., 1:] = wanted[..., 1:] != wanted[..., :-1]
    wanted = torch.where(fresh, wanted, tiles).sort(-1).values
    return wanted.to(torch.int32).contiguous(), (wanted < tiles).sum(-1).to(torch.int32)
