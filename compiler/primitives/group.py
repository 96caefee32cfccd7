"""`group`: rows put into groups by an index map, kept apart or combined into one row per group.

A group is a list of slots, a slot a row number. What a slot without a row holds is the padding policy's to say; what a
slot with an invalid row holds is nothing, under every policy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..refusal import Refused, nearest
from .attend_weights import highest
from .operator import Groups, Primitive
from .row_index import by_row, check_index, check_rows, full_index, is_row, pick
from .spec import Spec

COMBINE = ("assign", "sum", "mean", "lse")
PADDING = ("mask", "zero", "mirror", "borrow")


@dataclass(frozen=True)
class GroupSpec(Spec):
    combine: str = "assign"
    padding: str = "mask"


def group(
    x: Tensor,  # (B, H, N, D)
    index: Tensor,  # (G, S), (B|1, G, S) or (B|1, H|1, G, S): row numbers, S slots for each of G groups
    *,
    valid: Tensor | None = None,  # (N,), (B|1, N) or (B|1, H|1, N): rows that count
    combine: str = "assign",
    padding: str = "mask",
) -> tuple[Tensor, Tensor]:
    """combine="assign": rows (B, H, G, S, D) and which slots hold one (B, H, G, S). "sum", "mean", "lse" (logarithm of
    the sum of exponentials, channel by channel): one row per group (B, H, G, D) and which groups hold any (B, H, G);
    a group that holds none is 0, under "lse" -inf.

    A slot whose number lies outside 0 .. N - 1:
    padding="mask"    holds nothing.
    padding="zero"    holds a row of zeros that counts like any other.
    padding="mirror"  holds the row as far inside as its number lies outside, the edge counted: N is N - 1, -1 is 0.
    padding="borrow"  holds a row from beside the group: those before its first one, going backwards, then those after
                      its last, so that no row comes twice in a group of consecutive rows; nothing where there is none.
    """
    check_rows(x, "x", "group")
    check_index(index, x, 2, "group")
    for value, known, kind in ((combine, COMBINE, "combine"), (padding, PADDING, "padding")):
        if value not in known:
            raise Refused(f"{kind} {value!r}", where="group", fits=nearest(value, known))
    check_valid(valid, x, "group")
    rows, held = group_op(x, index, [] if valid is None else [valid], GroupSpec(combine, padding).text)
    return rows, held


def check_valid(valid: Tensor | None, x: Tensor, where: str) -> None:
    if valid is None:
        return
    if valid.ndim not in (1, 2, 3) or valid.shape[-1] != x.shape[2]:
        found = f"valid of shape {tuple(valid.shape)}"
        raise Refused(found, where=where, fits=f"(N,), (B, N) or (B, H, N), N={x.shape[2]}")
    check_index(valid.long(), x, 1, where)


def group_meaning(groups: Groups, text: str) -> list[Tensor]:
    (x,), (index,), tables = groups
    spec = GroupSpec.of(text)
    numbers = filled(full_index(index, x, 2), x, spec.padding)
    held = is_row(numbers, x)
    for valid in tables:
        rows_held = by_row(valid, x)
        held = held & pick(rows_held.unsqueeze(-1).to(x.dtype), numbers).squeeze(-1).ne(0)
    rows = pick(x, torch.where(held, numbers, -1))
    if spec.padding == "zero":
        held = held | ~is_row(numbers, x)
    if spec.combine == "assign":
        return [rows, held]
    wide = torch.promote_types(x.dtype, torch.float32)
    return [combined(rows.to(wide), held, spec.combine).to(x.dtype), held.any(-1)]


def filled(numbers: Tensor, x: Tensor, padding: str) -> Tensor:
    """Row numbers with those that lie outside replaced where the policy knows a row for them."""
    n = x.shape[2]
    if padding == "mirror" and n:
        folded = numbers % (2 * n)
        return torch.where(folded < n, folded, 2 * n - 1 - folded)
    if padding == "borrow" and n:
        inside = is_row(numbers, x)
        first = _edge(numbers.masked_fill(~inside, n), -1)
        last = -_edge((-numbers).masked_fill(~inside, 1), 0)
        last = torch.where(last < 0, n - 1, last)  # a group without a row of its own stands at the end
        missing = (~inside).long().cumsum(-1) - 1
        before, after = first - 1 - missing, last + 1 + (missing - first)
        return torch.where(inside, numbers, torch.where(before >= 0, before, after))
    return numbers


def _edge(numbers: Tensor, none: int) -> Tensor:
    """The smallest number of each group; `none` where a group has no slots."""
    return numbers.amin(-1, keepdim=True) if numbers.shape[-1] else numbers.new_full((*numbers.shape[:-1], 1), none)


def combined(rows: Tensor, held: Tensor, combine: str) -> Tensor:
    """rows (B, H, G, S, D) as one per group, over the slots that hold something."""
    counts = held.unsqueeze(-1)
    if combine == "lse":
        masked = rows.masked_fill(~counts, -torch.inf).mT
        top = highest(masked).detach()
        top = torch.where(torch.isfinite(top), top, 0.0)
        total = torch.exp(masked - top).sum(-1, keepdim=True)
        some = total > 0
        return torch.where(some, top + torch.log(torch.where(some, total, 1.0)), -torch.inf).squeeze(-1)
    total = (rows * counts).sum(-2)
    return total / counts.sum(-2).clamp(min=1) if combine == "mean" else total


def group_shapes(groups: Groups, text: str) -> list[Tensor]:
    (x,), (index,), _ = groups
    slots = index.shape[-2:] if GroupSpec.of(text).combine == "assign" else index.shape[-2:-1]
    batch, heads, _, dim = x.shape
    return [x.new_empty(batch, heads, *slots, dim), x.new_empty(batch, heads, *slots, dtype=torch.bool)]


group_op = Primitive("group", ("x", "index", "tables*"), group_meaning, group_shapes)
