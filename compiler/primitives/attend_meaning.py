"""What `attend` means, in plain torch: scores, weights and sums written out, in float32 or better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..refusal import Refused
from ..symbol_eval import evaluate
from ..symbol_text import parse
from .attend_spec import AttendSpec
from .operator import Groups


def attend_meaning(groups: Groups, text: str) -> list[Tensor]:
    (q,), kv, table_list = groups
    spec = AttendSpec.of(text)
    tables = {f"t{k}": t for k, t in enumerate(table_list)}
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, values = [_to_heads(t, q) for t in kv[::2]], [_to_heads(t, q) for t in kv[1::2]]
    columns: list[Tensor] = []  # the logits of each segment (B, H, N, M), -inf where not kept
    kept: list[Tensor] = []
    spaces: list[dict[str, Any]] = []
    for k, (keep, score, positions) in zip(keys, spec.segments, strict=True):
        names, whole = _index_space(q, k, spec.q_positions, positions, spec.align, tables)
        products = q.to(wide) @ k.to(wide).transpose(-1, -2)
        logits = evaluate(parse(score), {**names, "s": products}, tables, whole=whole)
        mask = evaluate(parse(keep), names, tables, whole=whole) if keep else torch.ones((), dtype=torch.bool)
        mask = (mask if mask.dtype == torch.bool else mask != 0).to(q.device)
        columns.append(logits.expand(products.shape))
        kept.append(mask.expand(products.shape))
        spaces.append({"names": names, "whole": whole})
    logits, mask = torch.cat(columns, -1), torch.cat(kept, -1)
    names, whole = spaces[0]["names"], spaces[0]["whole"]
    weights, lse = _weights(logits, mask, spec, names, tables, whole)
    if spec.after:
        if spec.more:
            raise Refused("`after` together with several segments", where="attend")
        weights = evaluate(parse(spec.after), {**names, "w": weights}, tables, whole=whole).expand(logits.shape)
    return [_output(which, weights, lse, torch.cat(values, -2), mask, q) for which in spec.outputs]


def _to_heads(t: Tensor, q: Tensor) -> Tensor:
    group = q.shape[1] // t.shape[1]
    t = t.expand(q.shape[0], *t.shape[1:])
    return t.repeat_interleave(group, 1) if group > 1 else t


def _index_space(
    q: Tensor, k: Tensor, q_map: str, k_map: str, align: str, tables: dict[str, Tensor]
) -> tuple[dict[str, Any], frozenset[str]]:
    """Tensors for b, h, i, j that broadcast over (B, H, N, M), and which of them count 0, 1, 2, ..."""
    (batch, heads, n), m = q.shape[:3], k.shape[-2]
    count = torch.arange
    offset = m - n if align == "end" else 0
    i = _positions(tables[q_map]) if q_map else (count(n, device=q.device) + offset).view(1, 1, n)
    j = _positions(tables[k_map]) if k_map else count(m, device=q.device).view(1, 1, m)
    names = {
        "b": count(batch, device=q.device).view(batch, 1, 1, 1),
        "h": count(heads, device=q.device).view(1, heads, 1, 1),
        "i": i.unsqueeze(-1),
        "j": j.unsqueeze(-2),
        "N": n,
        "M": m,
    }
    whole = {"b", "h"} | ({"i"} if not q_map and offset == 0 else set()) | (set() if k_map else {"j"})
    return names, frozenset(whole)


def _positions(table: Tensor) -> Tensor:
    return table.view(1, 1, -1) if table.ndim == 1 else table.unsqueeze(1)  # (1 | B, 1, N)


def _weights(
    logits: Tensor,
    mask: Tensor,
    spec: AttendSpec,
    names: dict[str, Any],
    tables: dict[str, Tensor],
    whole: frozenset[str],
) -> tuple[Tensor, Tensor]:
    """Normalised weights and the log of their sum before normalisation (B, H, N)."""
    if spec.normaliser == "stick":
        return _stick(logits, mask)
    if spec.normaliser == "softmax":
        masked = logits.masked_fill(~mask, -math.inf)
        top = masked.amax(-1, keepdim=True)
        virtual = None
        if spec.sink:
            logit = torch.as_tensor(evaluate(parse(spec.sink), names, tables, whole=whole), device=logits.device)
            virtual = logit.to(logits.dtype).expand(top.shape)
            top = torch.maximum(top, virtual)
        top = torch.where(torch.isfinite(top), top, torch.zeros_like(top)).detach()
        raw = torch.exp(masked - top)
        total = raw.sum(-1, keepdim=True)
        if virtual is not None:
            total = total + torch.exp(virtual - top)
        lse = (top + torch.log(total)).squeeze(-1)
        return raw / torch.where(total > 0, total, torch.ones_like(total)), lse
    weight = evaluate(parse(spec.weight or "exp(s)"), {"s": logits.masked_fill(~mask, 0.0)}, tables)
    raw = weight.masked_fill(~mask, 0.0)
    total = raw.sum(-1, keepdim=True)
    if spec.normaliser == "sum":
        divisor = total + spec.eps
        return raw / torch.where(divisor != 0, divisor, torch.ones_like(divisor)), torch.log(total).squeeze(-1)
    return raw, torch.log(total).squeeze(-1)


def _stick(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Stick-breaking from the last key backwards: log A_j = s_j - sum_{t >= j} softplus(s_t); lse holds the log remainder."""
    broken = torch.nn.functional.softplus(logits).masked_fill(~mask, 0.0)
    taken = broken.flip(-1).cumsum(-1).flip(-1)
    weights = torch.exp(logits - taken).masked_fill(~mask, 0.0)
    return weights, -broken.sum(-1)


def _output(which: str, weights: Tensor, lse: Tensor, v: Tensor, mask: Tensor, q: Tensor) -> Tensor:
    match which:
        case "o":
            return (weights @ v.to(weights.dtype)).to(q.dtype)
        case "lse":
            return lse
        case "weights":
            return weights
        case "colsum":
            return weights.sum(-2)
        case "colmean":
            return weights.sum(-2) / mask.sum(-2).clamp(min=1)
        case "colmax":
            return weights.amax(-2)
        case "entropy":
            return torch.special.entr(weights).sum(-1)
    raise Refused(f"output {which!r}", where="attend")


def attend_shapes(groups: Groups, text: str) -> list[Tensor]:
    (q,), kv, _ = groups
    spec = AttendSpec.of(text)
    batch, heads, n = q.shape[:3]
    m = sum(_lengths(kv))
    wide = torch.promote_types(q.dtype, torch.float32)
    sizes = {
        "o": (batch, heads, n, kv[1].shape[-1]),
        "lse": (batch, heads, n),
        "weights": (batch, heads, n, m),
        "entropy": (batch, heads, n),
    }
    return [
        q.new_empty(sizes.get(which, (batch, heads, m)), dtype=q.dtype if which == "o" else wide)
        for which in spec.outputs
    ]


def _lengths(kv: Sequence[Tensor]) -> list[Any]:
    return [k.shape[-2] for k in kv[::2]]
