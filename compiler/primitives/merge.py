"""`merge`: attention over parts of the keys put together, exactly as if one softmax had run over all of them.

    lse = log sum_p exp(lse_p),   o = sum_p exp(lse_p - lse) o_p

Associative and without an order, so that split keys, ring steps and several sources merge in any grouping. Rows that no
part has seen (lse_p = -inf everywhere) are 0 with an lse of -inf. Parts that were never divided add up as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..refusal import Refused, nearest
from .attend_weights import highest
from .operator import Groups, Primitive
from .row_index import check_rows
from .spec import Spec

KINDS = ("lse", "sum")


@dataclass(frozen=True)
class MergeSpec(Spec):
    by: str = "lse"


def merge(parts: Sequence[tuple[Tensor, Tensor]], *, by: str = "lse") -> tuple[Tensor, Tensor]:
    """The pair that stands for all parts.

    by="lse"  pairs (o (B, H, N, D), lse (B, H, N)) as `attend` gives them.
    by="sum"  pairs (numerators, denominators) of the same shapes, not yet divided.
    """
    if by not in KINDS:
        raise Refused(f"by {by!r}", where="merge", fits=nearest(by, KINDS))
    if not parts:
        raise Refused("no parts", where="merge", fits="at least one pair")
    for o, lse in parts:
        check_rows(o, "o", "merge")
        if o.shape != parts[0][0].shape or lse.shape != o.shape[:-1]:
            found = f"o {tuple(o.shape)} with {tuple(lse.shape)} beside o {tuple(parts[0][0].shape)}"
            raise Refused(found, where="merge", fits="parts of one shape (B, H, N, D), and (B, H, N)")
    o, lse = merge_op([o for o, _ in parts], [lse for _, lse in parts], MergeSpec(by).text)
    return o, lse


def merge_meaning(groups: Groups, text: str) -> list[Tensor]:
    parts, logs = groups
    kind, wide = parts[0].dtype, _wide(groups)
    lse = torch.stack([p.to(wide) for p in logs], -1)
    if MergeSpec.of(text).by == "sum":
        return [_sum([p.to(wide) for p in parts]).to(kind), lse.sum(-1)]
    top = highest(lse).detach()
    top = torch.where(torch.isfinite(top), top, 0.0)
    raw = torch.exp(lse - top)
    total = raw.sum(-1, keepdim=True)
    some = total > 0
    whole = torch.where(some, total, 1.0)
    merged = torch.where(some, top + torch.log(whole), -torch.inf).squeeze(-1)
    shares = (raw / whole).unbind(-1)
    return [_sum([p.to(wide) * share[..., None] for p, share in zip(parts, shares, strict=True)]).to(kind), merged]


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """One after another, as they lie in memory."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def merge_shapes(groups: Groups, text: str) -> list[Tensor]:
    o, lse = groups[0][0], groups[1][0]
    return [o.new_empty(o.shape), lse.new_empty(lse.shape, dtype=_wide(groups))]


def _wide(groups: Groups) -> torch.dtype:
    """One type for all parts, the same whichever comes first."""
    kind = torch.float32
    for group in groups:
        for t in group:
            kind = torch.promote_types(kind, t.dtype)
    return kind


merge_op = Primitive("merge", ("o*", "lse*"), merge_meaning, merge_shapes)
