"""What `scan` means, in plain torch: chunks of rows, a state between them, in float32 or better, never N x N.

Inside a chunk the decay between two rows is a product of factors in (s, t], never a quotient of running products, so
that nothing overflows and a factor of 0 is a factor of 0. `scan_reference` is the same formula as one N x N matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from ..symbol_eval import evaluate
from ..symbol_text import parse
from .operator import Groups
from .rows import repeat_heads
from .scan_spec import ScanSpec

CHUNK = 64  # rows at a time where the decay is one number per row and head
CHANNEL_CHUNK = 16  # where it is a vector, and the chunk costs its square times D


@dataclass(frozen=True)
class Operands:
    """q, k (B, H, N, D), v (B, H, M, Dv), features applied, the ones of the normaliser beside v; all wide."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None  # (B|1, H|1, N|1, D|1)
    document: Tensor | None  # (B|1, 1, N): 0, 1, ... in order
    state: Tensor  # (B, H, D, Dv')


def scan_meaning(groups: Groups, text: str) -> list[Tensor]:
    spec = ScanSpec.of(text)
    x = operands(groups, spec)
    if spec.causal:
        rows, state = _forwards(x, spec)
    elif x.document is None:
        state = x.state + x.k.mT @ x.v
        rows = x.q @ state
    else:
        rows, state = _both_ways(x, spec)
    return _outputs(rows, state, groups[0][0], spec)


def operands(groups: Groups, spec: ScanSpec) -> Operands:
    (q,), (k, v), table_list = groups
    tables = {f"t{n}": t for n, t in enumerate(table_list)}
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = repeat_heads(k, q).to(wide), repeat_heads(v, q).to(wide)
    x, k = _feature(spec.feature_q, q.to(wide)), _feature(spec.feature_k, k)
    decay = tables[spec.decay].to(wide) if spec.decay else None
    if decay is not None and decay.shape[1] not in (1, q.shape[1]):
        decay = repeat_heads(decay, q)
    if spec.normaliser == "sum":
        v = torch.cat((v, v.new_ones(*v.shape[:-1], 1)), -1)
    if spec.valid:
        valid = (tables[spec.valid] != 0).reshape(-1, 1, k.shape[2], 1)
        k = k * valid
        if decay is not None:
            decay = torch.where(valid, decay, 0.0 if spec.log_decay else 1.0)
    document = in_order(tables[spec.documents]) if spec.documents else None
    fresh = v.new_zeros(*q.shape[:2], k.shape[-1], v.shape[-1])
    state = tables[spec.state].to(wide).expand(fresh.shape) if spec.state else fresh
    return Operands(x, k, v, decay, document, state)


def _feature(text: str, x: Tensor) -> Tensor:
    value: Any = evaluate(parse(text), {"x": x}, {}) if text else x
    return torch.as_tensor(value, dtype=x.dtype, device=x.device).expand(x.shape)


def in_order(documents: Tensor) -> Tensor:
    """Ids of any kind as 0, 1, 2, ...: one more at each change."""
    ids = (documents if documents.ndim == 2 else documents[None]).unsqueeze(1)
    change = torch.zeros_like(ids, dtype=torch.long)
    change[..., 1:] = ids[..., 1:] != ids[..., :-1]
    return change.cumsum(-1)


def _forwards(x: Operands, spec: ScanSpec) -> tuple[Tensor, Tensor]:
    channels = x.decay is not None and x.decay.shape[-1] > 1
    size = CHANNEL_CHUNK if channels else CHUNK
    n = x.k.shape[2]
    rows, state = [], x.state
    previous = None if x.document is None else x.document[..., :1]
    for start, stop in pairwise(accumulate([min(size, n - at) for at in range(0, n, size)], initial=0)):
        cut = slice(start, stop)
        q, k, v = x.q[:, :, cut], x.k[:, :, cut], x.v[:, :, cut]
        between, since = _products(x.decay, cut, spec.log_decay, k)
        seen, carried = _seen(between, since, spec.read)
        if x.document is not None and previous is not None:
            ids = x.document[..., cut]
            same, unbroken = (ids[..., :, None] == ids[..., None, :])[..., None], (ids == previous)[..., None]
            between, since, seen, carried = between * same, since * unbroken, seen * same, carried * unbroken
            previous = ids[..., -1:]
        if channels:
            products = torch.einsum("bhtd,bhsd,bhtsd->bhts", q, k, seen.expand(*q.shape[:2], -1, -1, q.shape[-1]))
        else:
            products = (q @ k.mT) * seen[..., 0]
        rows.append(products @ v + (q * carried) @ state)
        state = since[..., -1, :, None] * state + (k * between[..., -1, :, :]).mT @ v
    return torch.cat(rows, 2) if rows else x.q @ state, state


def _products(decay: Tensor | None, cut: slice, logs: bool, like: Tensor) -> tuple[Tensor, Tensor]:
    """For rows t, s of a chunk the product of the factors in (s, t] (..., T, S, D|1), and in [0, t] (..., T, D|1)."""
    size = like.shape[2]
    lower = torch.ones(size, size, dtype=torch.bool, device=like.device).tril()[..., None]
    if decay is None:
        return lower.to(like.dtype)[None, None], like.new_ones(1, 1, size, 1)
    own = decay if decay.shape[2] == 1 else decay[:, :, cut]
    own = own.expand(-1, -1, size, -1)
    later = lower.squeeze(-1).tril(-1)[..., None]  # factor t takes part for the columns s < t
    if logs:
        sums = torch.where(later, own[..., :, None, :], 0.0).cumsum(-3)
        return torch.where(lower, torch.exp(sums), 0.0), torch.exp(own.cumsum(-2))
    products = torch.where(later, own[..., :, None, :], 1.0).cumprod(-3)
    return torch.where(lower, products, 0.0), own.cumprod(-2)


def _seen(between: Tensor, since: Tensor, read: str) -> tuple[Tensor, Tensor]:
    """The same from where the row reads: after its own update, or before it (one row earlier)."""
    if read == "after":
        return between, since
    none, whole = torch.zeros_like(between[..., :1, :, :]), torch.ones_like(since[..., :1, :])
    return torch.cat((none, between[..., :-1, :, :]), -3), torch.cat((whole, since[..., :-1, :]), -2)


def _both_ways(x: Operands, spec: ScanSpec) -> tuple[Tensor, Tensor]:
    """Every row reads its whole document: what came before it and itself, and what comes after it, read backwards."""
    rows, state = _forwards(x, spec)
    assert x.document is not None
    document = in_order(x.document.squeeze(1).flip(-1))
    turned = Operands(x.q.flip(2), x.k.flip(2), x.v.flip(2), None, document, torch.zeros_like(x.state))
    later, _ = _forwards(turned, ScanSpec(read="before"))
    return rows + later.flip(2), state


def _outputs(rows: Tensor, state: Tensor, q: Tensor, spec: ScanSpec) -> list[Tensor]:
    norm = rows.new_ones(rows.shape[:-1])
    if spec.normaliser == "sum":
        rows, norm = rows[..., :-1], rows[..., -1] + spec.eps
        rows = rows / torch.where(norm != 0, norm, torch.ones_like(norm))[..., None]
    found = {"o": rows.to(q.dtype), "state": state, "norm": norm}
    return [found[which] for which in spec.outputs]


def scan_reference(groups: Groups, text: str) -> list[Tensor]:
    """The same outputs from one matrix of N x M decays: small sizes only, what the chunks are compared with."""
    spec = ScanSpec.of(text)
    x = operands(groups, spec)
    n, m, whole = x.q.shape[2], x.k.shape[2], slice(None)
    if spec.causal:
        between, since = _products(x.decay, whole, spec.log_decay, x.k)
    else:
        between, since = x.k.new_ones(1, 1, n, m, 1), x.k.new_ones(1, 1, n, 1)
    seen, carried = _seen(between, since, spec.read)
    if x.document is not None:
        same, first = (x.document[..., :, None] == x.document[..., None, :])[..., None], (x.document == 0)[..., None]
        between, since, seen, carried = between * same, since * first, seen * same, carried * first
    last, last_since = between[..., -1, :, :], since[..., -1, :, None]
    weights = (x.q[..., :, None, :] * x.k[..., None, :, :] * seen).sum(-1)
    rows = weights @ x.v + (x.q * carried) @ x.state
    return _outputs(rows, last_since * x.state + (x.k * last).mT @ x.v, groups[0][0], spec)


def scan_shapes(groups: Groups, text: str) -> list[Tensor]:
    (q,), (_, v), _ = groups
    spec = ScanSpec.of(text)
    wide = torch.promote_types(q.dtype, torch.float32)
    extra = 1 if spec.normaliser == "sum" else 0
    sizes = {
        "o": (*q.shape[:3], v.shape[-1]),
        "state": (*q.shape[:2], q.shape[-1], v.shape[-1] + extra),
        "norm": q.shape[:3],
    }
    return [q.new_empty(sizes[which], dtype=q.dtype if which == "o" else wide) for which in spec.outputs]
