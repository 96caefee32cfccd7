"""The gradient of `attend` on a GPU: what is kept of each row, then a kernel over queries and one over keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...compiler.primitives.attend_spec import AttendSpec
from ...compiler.primitives.operator import Groups
from . import launch
from .arguments import Arguments, index, kinds, looked_up, named, port
from .attend import Attend, tables_in
from .attend_gradient import Gradient, why_no_gradient
from .blocks import Blocks, gradient_blocks, padded
from .launching import TooLargeError, launched, precision, target

FIRST_TABLE = 3  # of the tensors of a call with one segment: q, k, v, then tables


def gradients(
    groups: Groups, text: str, results: Sequence[Tensor], given: Mapping[int, Tensor], wanted: Sequence[int]
) -> Sequence[Tensor | None] | None:
    """Gradients from those of o and lse; None where the kernels cannot give what is wanted."""
    (q,), kv, tables = groups
    spec = AttendSpec.of(text)
    learned = tuple(k - FIRST_TABLE for k in wanted if k >= FIRST_TABLE)
    kernel = Attend(text, kinds(tables))
    if launch.refuses(groups, text) or why_no_gradient(kernel, learned):
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
        return _launched(groups, Gradient(kernel, learned), rows, named_grads.get("o"), wanted)
    except TooLargeError:
        return None


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


def _launched(
    groups: Groups, gradient: Gradient, rows: tuple[Tensor, Tensor], go: Tensor | None, wanted: Sequence[int]
) -> list[Tensor | None]:
    (q,), (k, v), tables = groups
    spec, batch = gradient.of.spec, q.shape[0]
    k_all, v_all = (t.expand(batch, *t.shape[1:]) for t in (k, v))
    go = q.new_zeros(*q.shape[:3], v.shape[-1]) if go is None else go.to(q.dtype)
    found: dict[int, Tensor] = {0: torch.empty_like(q, memory_format=torch.contiguous_format)}
    found |= {n: t.new_empty(t.shape) for n, t in ((1, k_all), (2, v_all))}
    found |= {FIRST_TABLE + n: torch.zeros(tables[n].shape, device=q.device) for n in gradient.learned}
    base = _base(groups, gradient, k_all, v_all, go, rows)
    over_queries, over_keys = gradient_blocks(q.shape[-1], v.shape[-1], q.element_size() * 8, target(q))
    grads: Arguments = {}
    for n in sorted({looked.number for looked in gradient.lookups}):
        into = found[FIRST_TABLE + n]
        grads |= {f"d{n}": into, **{f"d{n}_step{axis}": step for axis, step in enumerate(into.stride())}}
    heads = k.shape[1]
    if 0 in wanted or gradient.learned:
        own: Arguments = {
            "DQ": found[0],
            "G0": q.shape[1] // heads,
            "STEP": over_queries.rows,
            "WIDE": over_queries.keys,
        }
        if spec.q_positions:
            own |= index("at_q", named(groups)[spec.q_positions])
        if spec.k_positions:
            own |= index("at_k0", launch.of_heads(named(groups)[spec.k_positions], q, k))
        programs = (-(-q.shape[2] // over_queries.rows), batch * q.shape[1])
        launched(gradient.source, "back_queries", programs, base | own | grads | _sizes(over_queries))
    if 1 in wanted or 2 in wanted:
        own = {"DK": found[1], "DV": found[2], "G": q.shape[1] // heads}
        if spec.q_positions:
            own |= index("at_q0", launch.of_heads(named(groups)[spec.q_positions], q, k))
        if spec.k_positions:
            own |= index("at_k0", named(groups)[spec.k_positions])
        programs = (-(-k.shape[2] // over_keys.keys), batch * heads)
        launched(gradient.source_of_keys, "back_keys", programs, base | own | _sizes(over_keys))
    shapes = [q.shape, k.shape, v.shape, *(t.shape for t in tables)]
    return [found[n].sum_to_size(shapes[n]) for n in wanted]


def _sizes(blocks: Blocks) -> Arguments:
    return {"BM": blocks.rows, "BN": blocks.keys, "STAGES": blocks.stages, "num_warps": blocks.warps,
            "num_stages": blocks.stages}  # fmt: skip


def _base(
    groups: Groups, gradient: Gradient, k: Tensor, v: Tensor, go: Tensor, rows: tuple[Tensor, Tensor]
) -> Arguments:
    (q,), _, tables = groups
    given: Arguments = {**port("Q", q), **port("K0", k), **port("V0", v), **port("GO", go)}
    given |= {"KEPT": rows[0], "DELTA": rows[1], "H": q.shape[1], "N": q.shape[2], "M0": k.shape[2]}
    given["shift"] = k.shape[2] - q.shape[2] if gradient.of.spec.align == "end" else 0
    for number in tables_in(gradient.of.spec):
        given |= looked_up(number, tables[number])
    given |= {"D": q.shape[-1], "DP": padded(q.shape[-1]), "E": v.shape[-1], "EP": padded(v.shape[-1])}
    return given | {"PRECISION": precision(q)}
