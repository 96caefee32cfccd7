"""Which tokens join which: plans that send each token to a row, and the maps they stand for (ToMe, arXiv 2210.09461).

A plan is a matrix P in {0,1}^(rows x N) with one 1 in the column of each token that is kept:
    sum: P x      mean: P x / P 1      weighted: P (x * size) / P size      unmerge: P^T x

>>> x = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
>>> plan = match(x, r=1)
>>> merged, size = merge(plan, x, torch.ones(1, 4, 1))
>>> size.flatten().tolist()        # token 0 joined token 1
[1.0, 2.0, 1.0]
>>> unmerge(plan, merged).tolist() == x.tolist()
True
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    """rows (B, N): the row of the output that each token goes to, `total` for none; total: rows of the output."""

    rows: Tensor
    total: int


def match(metric: Tensor, r: int, *, class_token: bool = False, distill_token: bool = False) -> Plan:
    """Even tokens A, odd ones B: the r of A most like one of B join it. Kept tokens of A come first, then all of B.

    Ties go to the lower index. The class token (0) and the distillation token (1) are joined by and join nobody.
    """
    unit = _unit(metric)
    a, b = unit[:, ::2], unit[:, 1::2]
    scores = a @ b.mT  # (B, |A|, |B|)
    if class_token:
        scores = torch.cat([torch.full_like(scores[:, :1], -torch.inf), scores[:, 1:]], 1)
    if distill_token:
        scores = torch.cat([torch.full_like(scores[..., :1], -torch.inf), scores[..., 1:]], 2)
    best, to = scores.max(-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    source, kept = order[:, :r], order[:, r:]
    if class_token:
        kept = kept.sort(-1).values
    split = kept.shape[1]
    rank = torch.arange(split, device=metric.device).expand_as(kept)
    head = int(distill_token)  # with a distillation token: class, distillation, the other kept ones, the rest of B
    rank = torch.where(rank < 1, rank, rank + head) if head else rank
    of_b = torch.arange(b.shape[1], device=metric.device).expand(metric.shape[0], -1) + split
    of_b = torch.where(of_b == split, torch.full_like(of_b, 1), of_b) if head else of_b
    of_a = torch.zeros_like(order).scatter(1, kept, rank).scatter(1, source, of_b.gather(1, to.gather(1, source)))
    order_of_tokens = _interleaved(metric.shape[1], of_a.shape[1], metric.device).expand(metric.shape[:2])
    return Plan(torch.cat([of_a, of_b], 1).gather(1, order_of_tokens), metric.shape[1] - r)


def match_every(metric: Tensor, stride: int) -> Plan:
    """Every stride-th token is a row, all others join the one most like them; a tail shorter than stride is dropped."""
    batch, n = metric.shape[:2]
    total = n // stride
    unit = _unit(metric)
    anchors = unit[:, stride - 1 : total * stride : stride]
    to = (unit[:, : total * stride] @ anchors.mT).argmax(-1)
    token = torch.arange(total * stride, device=metric.device)
    rows = torch.where(token % stride == stride - 1, token // stride, to)
    dropped = torch.full((batch, n - total * stride), total, dtype=rows.dtype, device=metric.device)
    return Plan(torch.cat([rows, dropped], 1), total)


def match_at_random(metric: Tensor, r: int, uniform: Tensor) -> Plan:
    """The r tokens with the smallest of the uniform numbers (B, N) join the one most like them among the others, which
    come in the order of theirs."""
    unit = _unit(metric)
    order = uniform.argsort(dim=-1, stable=True)
    source, kept = order[:, :r], order[:, r:]
    to = (_rows_of(unit, source) @ _rows_of(unit, kept).mT).argmax(-1)
    rank = torch.arange(kept.shape[1], device=metric.device).expand_as(kept)
    return Plan(torch.zeros_like(order).scatter(1, kept, rank).scatter(1, source, to), kept.shape[1])


def merge(plan: Plan, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Size-weighted means of the tokens that share a row, and the sizes of the rows."""
    grown = _sum(plan, size)
    return _sum(plan, x * size) / grown, grown


def unmerge(plan: Plan, x: Tensor) -> Tensor:
    """Every original token receives the value of the row it went to; a dropped one 0."""
    padded = torch.cat([x, torch.zeros_like(x[:, :1])], 1)
    return _rows_of(padded, plan.rows)


def sources(plan: Plan, before: Tensor | None = None) -> Tensor:
    """(B, rows, N) with a 1 where a token of the beginning is in a row; `before`: the same of earlier merges."""
    n = plan.rows.shape[1]
    like = torch.eye(n, device=plan.rows.device).expand(plan.rows.shape[0], n, n) if before is None else before
    return _sum(plan, like)


def _unit(metric: Tensor) -> Tensor:
    return torch.nn.functional.normalize(metric.detach(), dim=-1)  # no gradient through the choice


def _interleaved(total: int, evens: int, device: torch.device) -> Tensor:
    """Positions in [A, B] of tokens 0, 1, 2, ...: A holds the even ones, B the odd ones."""
    token = torch.arange(total, device=device)
    return torch.where(token % 2 == 0, token // 2, evens + token // 2)


def _rows_of(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def _sum(plan: Plan, x: Tensor) -> Tensor:
    out = x.new_zeros(x.shape[0], plan.total + 1, x.shape[2])
    return out.scatter_add(1, plan.rows.unsqueeze(-1).expand_as(x), x)[:, : plan.total]
