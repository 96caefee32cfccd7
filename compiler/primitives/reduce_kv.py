"""`reduce_kv`: keys and values made fewer by (weighted) means of groups of rows, and how many rows each stands for.

Softmax over means counts a group once; adding the logarithm of its mass to its score counts it as often as its rows
stood, exact where the keys of a group are equal:

    k1, v1, mass = reduce_kv(k, v, index)
    attend(q, k1, v1, score=lambda s, b, h, j: s + log(mass)[b, h, j], ...)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..refusal import Refused
from .group import check_valid
from .operator import Groups, Primitive
from .row_index import check_index, check_rows, full_index, is_row, pick
from .spec import Spec


@dataclass(frozen=True)
class ReduceSpec(Spec):
    weighted: bool = False  # the table holds weights, otherwise which rows are valid


def reduce_kv(
    k: Tensor,  # (B, Hkv, M, Dq)
    v: Tensor,  # (B, Hkv, M, Dv)
    index: Tensor,  # (G, S), (B|1, G, S) or (B|1, Hkv|1, G, S): row numbers, one outside 0 .. M - 1 is no row
    *,
    weights: Tensor | None = None,  # (M,), (B|1, M) or (B|1, Hkv|1, M), >= 0
    valid: Tensor | None = None,  # of the same shapes: rows that count
) -> tuple[Tensor, Tensor, Tensor]:
    """(k, v, mass): G keys and values, and the mass (B, Hkv, G) of each: its number of rows, or its sum of weights.
    A group of mass 0 has a key and a value of 0."""
    for t, what in ((k, "k"), (v, "v")):
        check_rows(t, what, "reduce_kv")
    if k.shape[:3] != v.shape[:3]:
        raise Refused(f"k {tuple(k.shape)}, v {tuple(v.shape)}", where="reduce_kv", fits="equal B, H and M")
    check_index(index, k, 2, "reduce_kv")
    if weights is not None and valid is not None:
        raise Refused("weights and valid", where="reduce_kv", fits="one of them: a weight of 0 leaves a row out")
    given = valid if weights is None else weights
    check_valid(given, k, "reduce_kv")
    tables = [] if given is None else [given]
    k, v, mass = reduce_op(k, v, index, tables, ReduceSpec(weights is not None).text)
    return k, v, mass


def reduce_meaning(groups: Groups, text: str) -> list[Tensor]:
    (k,), (v,), (index,), tables = groups
    wide = torch.promote_types(k.dtype, torch.float32)
    numbers = full_index(index, k, 2)
    share = is_row(numbers, k).to(wide)
    for table in tables:
        own = table.to(wide) if ReduceSpec.of(text).weighted else (table != 0).to(wide)
        while own.ndim < 3:
            own = own.unsqueeze(0) if own.ndim == 1 else own.unsqueeze(1)
        share = share * pick(own.expand(*k.shape[:3]).unsqueeze(-1), numbers).squeeze(-1)
    mass = share.sum(-1)
    divisor = torch.where(mass != 0, mass, 1.0).unsqueeze(-1)
    k1, v1 = ((share.unsqueeze(-2) @ pick(t.to(wide), numbers)).squeeze(-2) / divisor for t in (k, v))
    return [k1.to(k.dtype), v1.to(v.dtype), mass]


def reduce_shapes(groups: Groups, text: str) -> list[Tensor]:
    (k,), (v,), (index,), _ = groups
    size = (*k.shape[:2], index.shape[-2])
    wide = torch.promote_types(k.dtype, torch.float32)
    return [k.new_empty(*size, k.shape[-1]), v.new_empty(*size, v.shape[-1]), k.new_empty(size, dtype=wide)]


reduce_op = Primitive("reduce_kv", ("k", "v", "index", "tables*"), reduce_meaning, reduce_shapes)
