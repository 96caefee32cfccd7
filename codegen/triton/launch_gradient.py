"""The gradient of `attend` on a GPU: what is kept of each row, then a kernel over queries and one over keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...compiler.primitives.attend_grouped import added_back, copied_out, table_of
from ...compiler.primitives.attend_spec import AttendSpec
from ...compiler.primitives.operator import Groups
from .. import relative
from . import launch
from .arguments import Arguments, index, kinds, looked_up, named, port
from .attend import Attend, tables_in
from .attend_gradient import Gradient, why_no_gradient
from .blocks import Blocks, gradient_blocks, padded, scanning_blocks
from .launching import UnfitError, launched, precision, target
from .parts import parts


def gradients(
    groups: Groups, text: str, results: Sequence[Tensor], given: Mapping[int, Tensor], wanted: Sequence[int]
) -> Sequence[Tensor | None] | None:
    """Gradients from those of o and lse; None where the kernels cannot give what is wanted."""
    (q,), kv, tables = groups
    spec = AttendSpec.of(text)
    if spec.relative:
        if launch.refuses(groups, text):
            return None
        return relative.through_products(gradients, groups, text, results, given, wanted)
    if spec.group_rows:
        return _through_groups(groups, text, results, given, wanted)
    first_table = 1 + len(kv)
    learned = tuple(k - first_table for k in wanted if k >= first_table)
    kernel = Attend(text, kinds(tables))
    if spec.stored or launch.refuses(groups, text) or why_no_gradient(kernel, learned):
        return None
    named_grads = {spec.outputs[n]: g for n, g in given.items()}
    if "lse" in named_grads and not (kernel.folding.powers and spec.normaliser == "softmax"):
        return None
    known = dict(zip(spec.outputs, results))
    missing = replace(spec, outputs=tuple(which for which in ("o",) if which not in known and "o" in named_grads))
    if missing.outputs:
        known |= dict(zip(missing.outputs, launch.run(groups, missing.text), strict=True))
    try:
        rows = _rows(groups, spec, known, named_grads, kernel)
        found = _summed(groups, text, rows, named_grads.get("o"), learned)
    except UnfitError:
        return None
    shapes = [q.shape, *(t.shape for t in (*kv, *tables))]
    return [found[n].sum_to_size(shapes[n]) for n in wanted]


def _through_groups(
    groups: Groups, text: str, results: Sequence[Tensor], given: Mapping[int, Tensor], wanted: Sequence[int]
) -> Sequence[Tensor | None] | None:
    """The gradient of what groups read goes on to the rows that they read it from."""
    _, kv, tables = groups
    found = gradients(*copied_out(groups, text), results, given, wanted)
    table = table_of(AttendSpec.of(text), tables)
    if found is None or table is None:
        return None
    own = {1: kv[0], 2: kv[1]}
    return [added_back(g, own[n], table) if n in own and g is not None else g for n, g in zip(wanted, found)]


def _summed(
    groups: Groups, text: str, rows: tuple[Tensor, Tensor], go: Tensor | None, learned: tuple[int, ...]
) -> dict[int, Tensor]:
    """The gradients of q, of every k and v, and of the learned tables, over all segments."""
    (q,), kv, tables = groups
    found: dict[int, Tensor] = {}
    first_table = 1 + len(kv)
    own = list(enumerate(parts(groups, text)))
    calls = [_Call(part.groups, Gradient(Attend(part.text, kinds(part.groups[2])), learned), go) for _, part in own]
    runs: Arguments = {}
    if calls[0].gradient.scans:  # from the last key of the last segment on
        rows, runs = _totals(calls, rows), _begun(q)
    for (number, part), call in reversed(list(zip(own, calls))):
        dq, of_tables, edges = call.over_queries(rows, runs)
        dk, dv = call.over_keys(rows, edges)
        found |= {1 + 2 * number: part.back(dk), 2 + 2 * number: part.back(dv)}
        for n, gradient in ((0, dq), *((first_table + n, t) for n, t in of_tables.items())):
            found[n] = found[n] + gradient if n in found else gradient
    return found


def _begun(q: Tensor) -> Arguments:
    return {name: torch.zeros(q.shape[:3], device=q.device) for name in ("RUN_X", "RUN_R")}


def _totals(calls: Sequence[_Call], rows: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """delta as a first pass over the keys sums it up: o . do, of weights that met values in fewer bits, is not near
    enough where what later keys have of it is taken away."""
    runs = _begun(calls[0].groups[0][0])
    for call in reversed(calls):
        replace(call, gradient=replace(call.gradient, learned=())).over_queries(rows, runs)
    return rows[0], runs["RUN_R"]


def _rows(
    groups: Groups, spec: AttendSpec, known: Mapping[str, Tensor], given: Mapping[str, Tensor], kernel: Attend
) -> tuple[Tensor, Tensor]:
    """What is kept of each row, and delta = o . do - dlse."""
    (q,), _, _ = groups
    delta = (known["o"].float() * given["o"].float()).sum(-1) if "o" in given else q.new_zeros(q.shape[:3]).float()
    if "lse" in given:
        delta = delta - given["lse"]
    if kernel.folding.row.kept is None:
        return delta, delta
    alone = replace(spec, outputs=("lse",))  # of the rows alone: values are not read
    return launch.run(groups, alone.text, keeps=True)[-1], delta.contiguous()


@dataclass(frozen=True)
class _Call:
    """A plain call: one segment, keys in order, under the gradient of o."""

    groups: Groups
    gradient: Gradient
    go: Tensor | None

    def over_queries(self, rows: tuple[Tensor, Tensor], runs: Arguments) -> tuple[Tensor, dict[int, Tensor], Arguments]:
        """dq, the gradients of learned tables, and what keys have come to at the end of every tile."""
        (q,), (k, _), tables = self.groups
        gradient, spec = self.gradient, self.gradient.of.spec
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        of_tables = {n: torch.zeros(tables[n].shape, device=q.device) for n in gradient.learned}
        step, parts_, wide, blocks = launch.steps(spec.tiles, self.blocks[0])
        own: Arguments = {"DQ": dq, "G0": q.shape[1] // k.shape[1], "STEP": step, "WIDE": wide}
        for n in sorted({looked.number for looked in gradient.lookups}):
            own |= {f"d{n}": of_tables[n]}
            own |= {f"d{n}_step{axis}": move for axis, move in enumerate(of_tables[n].stride())}
        edges: Arguments = {}
        if gradient.scans:
            count = -(-k.shape[2] // wide)
            edges = {name: q.new_zeros(*q.shape[:3], count, dtype=torch.float32) for name in ("EDGE_X", "EDGE_R")}
            edges["EDGES"] = count
        own |= runs | edges | launch.listing(spec, named(self.groups), k.shape[2], parts_)
        own |= _placed(self.groups, gradient, "at_q", "at_k0", of_keys=False)
        programs = -(-q.shape[2] // step) * q.shape[0] * q.shape[1]
        launched(gradient.source, "back_queries", (programs,), self._base(rows) | own | _sizes(blocks))
        return dq, of_tables, edges

    def over_keys(self, rows: tuple[Tensor, Tensor], edges: Arguments) -> list[Tensor]:
        """dk and dv."""
        (q,), (k, v), _ = self.groups
        gradient, spec = self.gradient, self.gradient.of.spec
        dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (k, v))
        wide, parts_, step, blocks = _steps_of_keys(spec, self.blocks[1])
        own: Arguments = {"DK": dk, "DV": dv, "G": q.shape[1] // k.shape[1], "STEP": step, "WIDE": wide}
        own |= edges | launch.listing(spec, named(self.groups), k.shape[2], parts_, turned=True)
        own |= _placed(self.groups, gradient, "at_q0", "at_k0", of_keys=True)
        programs = -(-k.shape[2] // step) * q.shape[0] * k.shape[1]
        launched(gradient.source_of_keys, "back_keys", (programs,), self._base(rows) | own | _sizes(blocks))
        return [dk, dv]

    @property
    def blocks(self) -> tuple[Blocks, Blocks]:
        """Of the pass over queries and of that over keys; what is kept at the end of a tile is read at the same one."""
        (q,), (_, v), _ = self.groups
        sizes = q.shape[-1], v.shape[-1], q.element_size() * 8, target(q)
        return scanning_blocks(*sizes) if self.gradient.scans else gradient_blocks(*sizes)

    def _base(self, rows: tuple[Tensor, Tensor]) -> Arguments:
        (q,), (k, v), tables = self.groups
        go = q.new_zeros(*q.shape[:3], v.shape[-1]) if self.go is None else self.go.to(q.dtype)
        given: Arguments = {**port("Q", q), **port("K0", k), **port("V0", v), **port("GO", go)}
        given |= {"KEPT": rows[0], "DELTA": rows[1], "H": q.shape[1], "N": q.shape[2], "M0": k.shape[2]}
        given["shift"] = k.shape[2] - q.shape[2] if self.gradient.of.spec.align == "end" else 0
        for number in tables_in(self.gradient.of.spec):
            given |= looked_up(number, tables[number])
        given |= {"D": q.shape[-1], "DP": padded(q.shape[-1]), "E": v.shape[-1], "EP": padded(v.shape[-1])}
        return given | {"PRECISION": precision(q)}


def _steps_of_keys(spec: AttendSpec, blocks: Blocks) -> tuple[int, int, int, Blocks]:
    """Rows from one tile to the next, tiles of rows in a listed one, keys from one block to the next, the blocks."""
    tiles = (spec.tiles[0], spec.tiles[2], spec.tiles[1]) if spec.tiles else ()
    step, parts_, wide, fitted = launch.steps(tiles, replace(blocks, rows=blocks.keys, keys=blocks.rows))
    return wide, parts_, step, replace(fitted, rows=fitted.keys, keys=fitted.rows)


def _placed(groups: Groups, gradient: Gradient, queries: str, keys: str, *, of_keys: bool) -> Arguments:
    """Where queries and keys stand, by heads of queries; keys by their own heads where a block is one of keys."""
    (q,), (k, _), _ = groups
    spec, tables = gradient.of.spec, named(groups)
    found: Arguments = {}
    if spec.q_positions:
        found |= index(queries, launch.of_heads(tables[spec.q_positions], q, k))
    if spec.k_positions:
        stand = tables[spec.k_positions]
        found |= index(keys, stand if of_keys else launch.of_heads(stand, q, k))
    return found


def _sizes(blocks: Blocks) -> Arguments:
    return {"BM": blocks.rows, "BN": blocks.keys, "STAGES": blocks.stages, "num_warps": blocks.warps,
            "num_stages": blocks.stages}  # fmt: skip
