"""What `attend` means, in plain torch: scores, weights and sums written out, in float32 or better."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..symbol_eval import evaluate
from ..symbol_text import parse
from .attend_logits import Columns, columns
from .attend_spec import FAINT, AttendSpec, count_of
from .attend_stored import in_numbers, widths
from .attend_weights import weights_of
from .operator import Groups


def attend_meaning(groups: Groups, text: str) -> list[Tensor]:
    groups, text = in_numbers(groups, text)
    (q,), kv, table_list = groups
    spec = AttendSpec.of(text)
    tables = {f"t{n}": t for n, t in enumerate(table_list)}
    parts = columns(q, kv, tables, spec)
    logits, kept = torch.cat([p.logits for p in parts], -1), torch.cat([p.kept for p in parts], -1)

    if spec.empty:
        logits, kept = _filled(logits, kept, parts[0], spec, tables)

    own = {n: parts[0].names[n] for n in ("b", "h", "i", "N")}

    def value(expression: str, s: Tensor) -> Tensor:
        found = evaluate(parse(expression), {**own, "s": s}, tables, whole=parts[0].whole)
        return torch.as_tensor(found, dtype=s.dtype, device=s.device).expand(s.shape)

    weights, lse = weights_of(logits, kept, spec, value, _leaders(parts, spec, tables))
    if spec.after:
        weights = torch.cat(_afterwards(weights, parts, spec, tables), -1)
    return [_output(which, q, logits, kept, weights, lse, parts) for which in spec.outputs]


def _filled(
    logits: Tensor, kept: Tensor, own: Columns, spec: AttendSpec, tables: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Rows that keep nothing see every key, by the score that the spec gives for them."""
    none = ~(kept & (logits > FAINT)).any(-1, keepdim=True)
    scores = evaluate(parse(spec.empty), own.names, tables, whole=own.whole)
    return torch.where(none, torch.as_tensor(scores, dtype=logits.dtype, device=logits.device), logits), kept | none


def _leaders(parts: list[Columns], spec: AttendSpec, tables: dict[str, Tensor]) -> Tensor | None:
    """The column that leads each column; keys of further segments lead themselves."""
    if not spec.leader:
        return None
    own, shape = parts[0], parts[0].logits.shape
    value = evaluate(parse(spec.leader), own.names, tables, whole=own.whole)
    found = [torch.as_tensor(value, device=own.logits.device).long().expand(shape)]
    first = shape[-1]
    for part in parts[1:]:
        count = part.logits.shape[-1]
        found.append((torch.arange(count, device=own.logits.device) + first).expand(part.logits.shape))
        first += count
    return torch.cat(found, -1)


def _afterwards(weights: Tensor, parts: list[Columns], spec: AttendSpec, tables: dict[str, Tensor]) -> list[Tensor]:
    pieces = weights.split([p.logits.shape[-1] for p in parts], -1)
    after = parse(spec.after)
    return [
        torch.as_tensor(
            evaluate(after, {**p.names, "w": w}, tables, whole=p.whole), dtype=w.dtype, device=w.device
        ).expand(w.shape)
        for w, p in zip(pieces, parts, strict=True)
    ]


def _output(
    which: str, q: Tensor, logits: Tensor, kept: Tensor, weights: Tensor, lse: Tensor, parts: list[Columns]
) -> Tensor:
    kind, count = count_of(which)
    match kind:
        case "o":
            return _applied(weights, parts).to(q.dtype)
        case "lse":
            return lse
        case "logits":
            return logits.masked_fill(~kept, -math.inf)
        case "weights":
            return weights
        case "colsum":
            return weights.sum(-2)
        case "colmean":
            return weights.sum(-2) / kept.sum(-2).clamp(min=1)
        case "colmax":
            return weights.amax(-2) if weights.shape[-2] else weights.sum(-2)
        case "entropy":
            some = weights > 0
            return -torch.where(some, weights * torch.log(torch.where(some, weights, 1.0)), 0.0).sum(-1)
        case "topk":
            return _highest_columns(logits.masked_fill(~kept, -math.inf), count)
    missing = max(count - weights.shape[-2], 0)  # slab: rows before the first are 0
    return torch.nn.functional.pad(weights[..., -count:, :], (0, 0, missing, 0))


def _applied(weights: Tensor, parts: list[Columns]) -> Tensor:
    pieces = weights.split([p.logits.shape[-1] for p in parts], -1)
    total: Tensor | None = None
    for w, part in zip(pieces, parts, strict=True):
        o = w @ part.v if part.v.ndim == 4 else (w.unsqueeze(-2) @ part.v).squeeze(-2)
        total = o if total is None else total + o
    assert total is not None
    return total


def _highest_columns(masked: Tensor, count: int) -> Tensor:
    """The columns of the largest logits, lowest index first among equals, -1 where a row keeps fewer."""
    values, order = masked.detach().sort(dim=-1, descending=True, stable=True)
    order = torch.where(values > -math.inf, order, -1)[..., :count]
    return torch.nn.functional.pad(order, (0, count - order.shape[-1]), value=-1)


def attend_shapes(groups: Groups, text: str) -> list[Tensor]:
    (q,), kv, tables = groups
    spec = AttendSpec.of(text)
    batch, heads, n = q.shape[:3]
    m = 0
    for index, k in enumerate(kv[::2]):
        table = spec.rows_of(index)
        m = m + (tables[int(table[1:])].shape[-1] if table else k.shape[-2])
    wide = torch.promote_types(q.dtype, torch.float32)
    found = []
    for which in spec.outputs:
        kind, count = count_of(which)
        if kind == "topk":
            found.append(q.new_empty(batch, heads, n, count, dtype=torch.long))
            continue
        size = {
            "o": (batch, heads, n, widths(kv, spec)[1]),
            "lse": (batch, heads, n),
            "entropy": (batch, heads, n),
            "weights": (batch, heads, n, m),
            "logits": (batch, heads, n, m),
            "slab": (batch, heads, count, m),
        }.get(kind, (batch, heads, m))
        found.append(q.new_empty(size, dtype=q.dtype if kind == "o" else wide))
    return found
