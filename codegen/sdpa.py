"""`attend` by torch's own fused attention, wherever it can say the same without a mask tensor of N x M.

In this order: everything kept or causal; keys masked by a condition on keys alone; any other predicate or bias, in
blocks of query rows, each against the keys that its rows can reach.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compiler.primitives.attend import attend_op
from ..compiler.primitives.attend_spec import CAUSAL, FAINT, AttendSpec
from ..compiler.primitives.operator import Groups, Kernel
from ..compiler.primitives.rows import repeat_heads
from ..compiler.reach import Reach, reach
from ..compiler.symbol_eval import evaluate
from ..compiler.symbols import Expr, build

Names = dict[str, Any]
BLOCK_ROWS = 256  # query rows of one sliced call: smaller wastes fewer keys, larger calls less often


@lru_cache(maxsize=1024)
def linear_score(text: str) -> tuple[float, Expr | None] | None:
    """(factor, rest) where the score is s * factor + rest and the rest does not depend on s."""
    score = AttendSpec.of(text).score_expr
    terms = score.args if score.op == "add" else (score,)
    with_s = [t for t in terms if "s" in t.names]
    rest = [t for t in terms if "s" not in t.names]
    if len(with_s) != 1:
        return None
    factor = _factor(with_s[0])
    if not factor:  # a factor of 0 is not one that torch's kernels expect: they give no numbers
        return None
    return factor, build("add", *rest) if rest else None


def _factor(term: Expr) -> float | None:
    if term.text == "s":
        return 1.0
    if term.op == "mul" and len(term.args) == 2 and term.args[0].text == "s" and term.args[1].op == "const":
        return float(term.args[1].args[0])
    return None


@lru_cache(maxsize=1024)
def why_not_softmax(text: str) -> str | None:
    """Why a spec is beyond fused attention on one segment, whatever its mask; None where it is not."""
    spec = AttendSpec.of(text)
    if spec.normaliser != "softmax" or spec.weight:
        return f"normaliser {spec.normaliser}"
    if AttendSpec(score=spec.score, keep=spec.keep, align=spec.align, empty=spec.empty).text != spec.text:
        return "asks for more than the output of a plain softmax over one segment"
    return None if linear_score(text) is not None else f"score {spec.score}"


def _scale(text: str) -> float:
    found = linear_score(text)
    return found[0] if found else 1.0


def _rest(text: str) -> Expr | None:
    found = linear_score(text)
    return found[1] if found else None


def refuses_dense(groups: Groups, text: str) -> str | None:
    reason = why_not_softmax(text)
    if reason or _rest(text) is not None:
        return reason or "a bias"
    spec = AttendSpec.of(text)
    n, m = groups[0][0].shape[-2], groups[1][0].shape[-2]
    if not spec.keep:
        return None
    if any(c.text != CAUSAL for c in spec.conjuncts):
        return f"predicate {spec.keep}"
    if spec.align == "start" or n == m or n == 1:
        return None
    return "causal rows that end at the last key"


def _run_dense(groups: Groups, text: str) -> list[Tensor]:
    (q,), (k, v), _ = groups
    spec = AttendSpec.of(text)
    single = spec.align == "end" and q.shape[-2] == 1  # one row at the end sees every key
    return [_fused(q, k, v, _scale(text), causal=bool(spec.keep) and not single)]


def _refuse_keys(groups: Groups, text: str) -> str | None:
    reason = why_not_softmax(text)
    if reason or _rest(text) is not None:
        return reason or "a bias"
    spec = AttendSpec.of(text)
    if not spec.keep or not spec.keep_expr.names <= {"b", "j"}:
        return f"predicate {spec.keep or 'everything'} is not a condition on keys alone"
    return None


def _run_keys(groups: Groups, text: str) -> list[Tensor]:
    (q,), (k, v), tables = groups
    spec = AttendSpec.of(text)
    m = k.shape[-2]
    named = {f"t{index}": table for index, table in enumerate(tables)}
    rows, keys = torch.zeros(1, dtype=torch.long, device=q.device), torch.arange(m, device=q.device)
    keep = _mask(spec, None, rows, keys, q, m, named)
    if spec.empty and keep is not None and not bool(keep.any(-1).all()):
        return _run_rows(groups, text)
    return [_masked(q, k, v, None if keep is None or bool(keep.all()) else keep, _scale(text))]


def _refuse_rows(groups: Groups, text: str) -> str | None:
    return why_not_softmax(text)


def _run_rows(groups: Groups, text: str) -> list[Tensor]:
    """Blocks of query rows against the keys that they can reach; mask and bias exist for one block at a time."""
    (q,), (k, v), tables = groups
    spec, bound = AttendSpec.of(text), reach(text)
    n, m = q.shape[-2], k.shape[-2]
    shift = m - n if spec.align == "end" else 0
    named = {f"t{index}": table for index, table in enumerate(tables)}
    parts = []
    for first in range(0, n, BLOCK_ROWS):
        last = min(first + BLOCK_ROWS, n)
        keys = _reached(first + shift, last + shift, m, bound, q.device)
        rows = torch.arange(first + shift, last + shift, device=q.device)
        mask = _mask(spec, _rest(text), rows, keys, q, m, named)
        near_k, near_v = (t if len(keys) == m else _take(t, keys) for t in (k, v))
        own = q[..., first:last, :]
        o = _masked(own, near_k, near_v, mask, _scale(text))
        if spec.empty_expr is not None and m:
            o = _filled(o, own, k, v, _none(mask, keys), spec.empty_expr, _names(rows, torch.arange(m), q, m), named)
        parts.append(o)
    return [torch.cat(parts, -2)] if parts else [q.new_empty(*q.shape[:-1], v.shape[-1])]


def _none(mask: Tensor | None, keys: Tensor) -> Tensor:
    """Which rows keep nothing, (B|1, H|1, N|1, 1)."""
    if mask is None or len(keys) == 0:
        return torch.full((1, 1, 1, 1), len(keys) == 0, device=keys.device)
    return ~(mask if mask.dtype == torch.bool else mask > FAINT).any(-1, keepdim=True)


def _filled(
    o: Tensor, q: Tensor, k: Tensor, v: Tensor, none: Tensor, empty: Expr, names: Names, tables: dict[str, Tensor]
) -> Tensor:
    """Rows that keep nothing by the score that stands for them, over all keys."""
    if not bool(none.any()):
        return o
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (repeat_heads(t, q).to(wide) for t in (k, v))
    score = evaluate(empty, {**names, "s": q.to(wide) @ k.mT}, tables)
    weights = torch.nan_to_num(score.to(wide).softmax(-1), nan=0.0)
    return torch.where(none, (weights @ v).to(o.dtype), o)


def _reached(first: int, last: int, m: int, bound: Reach, device: torch.device) -> Tensor:
    """Key positions that rows first .. last - 1 can see: the sinks, then a range."""
    high = m if bound.ahead is None else min(m, max(0, last + bound.ahead))
    low = 0 if bound.back is None else min(max(0, first - bound.back), high)
    near = torch.arange(low, high, device=device)
    sinks = min(bound.sinks, low)
    return torch.cat([torch.arange(sinks, device=device), near]) if sinks else near


def _take(t: Tensor, keys: Tensor) -> Tensor:
    if len(keys) == 0:
        return t[..., :0, :]
    low, high = int(keys[-1]) + 1 - len(keys), int(keys[-1]) + 1
    return t[..., low:high, :] if int(keys[0]) == low else t.index_select(-2, keys)


def _mask(
    spec: AttendSpec, rest: Expr | None, rows: Tensor, keys: Tensor, q: Tensor, m: int, tables: dict[str, Tensor]
) -> Tensor | None:
    """Predicate and bias of one block: boolean, or additive in q's type; None where neither is there."""
    n, names = q.shape[2], _names(rows, keys, q, m)
    whole = {"b", "h"} | ({"j"} if len(keys) == m else set())
    whole |= {"i"} if len(rows) == n and spec.align == "start" else set()
    keep = evaluate(spec.keep_expr, names, tables, whole=frozenset(whole)) if spec.keep else None
    if keep is not None and keep.dtype != torch.bool:
        keep = keep != 0
    if rest is None:
        return keep
    bias = torch.as_tensor(evaluate(rest, names, tables, whole=frozenset(whole)), device=q.device).to(q.dtype)
    return bias if keep is None else torch.where(keep, bias, torch.full((), -math.inf, dtype=q.dtype, device=q.device))


def _names(rows: Tensor, keys: Tensor, q: Tensor, m: int) -> Names:
    batch, heads, n = q.shape[:3]
    return {
        "b": torch.arange(batch, device=q.device).view(batch, 1, 1, 1),
        "h": torch.arange(heads, device=q.device).view(1, heads, 1, 1),
        "i": rows.view(1, 1, -1, 1),
        "j": keys.to(q.device).view(1, 1, 1, -1),
        "N": n,
        "M": m,
    }


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    if k.shape[-2] == 0:
        return q.new_zeros(*q.shape[:-1], v.shape[-1])
    if mask is None:
        return _fused(q, k, v, scale)
    mask = mask.expand(*mask.shape[:2], q.shape[-2], k.shape[-2])
    kept = mask if mask.dtype == torch.bool else mask > -math.inf
    empty = ~kept.any(-1, keepdim=True)
    if not bool(empty.any()):
        return _fused(q, k, v, scale, mask=mask)
    filled = mask | empty if mask.dtype == torch.bool else mask.masked_fill(empty, 0.0)
    return _fused(q, k, v, scale, mask=filled).masked_fill(empty, 0.0)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    if 0 in q.shape or k.shape[-2] == 0:
        return q.new_zeros(*q.shape[:-1], v.shape[-1])
    if k.shape[0] != q.shape[0]:
        k, v = (t.expand(q.shape[0], *t.shape[1:]) for t in (k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


for _device in ("cpu", "cuda"):
    attend_op.kernels.setdefault(_device, []).extend(
        [
            Kernel("sdpa", refuses_dense, _run_dense, plain=True, differentiable=True),
            Kernel("sdpa over kept keys", _refuse_keys, _run_keys, differentiable=True),
            Kernel("sdpa in blocks of rows", _refuse_rows, _run_rows, differentiable=True),
        ]
    )
