"""`attend` of groups whose keys are read where they lie: a `group` folded into the loads of what attends its rows.

With `group_rows` in its spec a call's k and v hold whole samples, and a sample of q is one of their groups: group b % G
of sample b // G, there being G times as many. Its key n is row `table[b % G, n]`, or zeros where there is none, and
stands at position n. What cannot read rows so gets them copied out first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .attend_spec import AttendSpec
from .group import GroupSpec, group_meaning
from .operator import Groups


def groups_of(q: Tensor, k: Tensor) -> int:
    """How many samples of q share one of k."""
    return q.shape[0] // k.shape[0]


def table_of(spec: AttendSpec, tables: Sequence[Tensor]) -> Tensor | None:
    """The rows (G, S) of every group, or of those of each sample (B * G, S)."""
    return tables[int(spec.group_rows[1:])] if spec.group_rows else None


def keys_of(k: Tensor, spec: AttendSpec, tables: Sequence[Tensor]) -> int:
    """How many keys a query of the first segment has before it."""
    table = table_of(spec, tables)
    return k.shape[2] if table is None else table.shape[-1]


def copied_out(groups: Groups, text: str) -> tuple[Groups, str]:
    """The same call on the rows of each group."""
    spec = AttendSpec.of(text)
    (q,), kv, tables = groups
    table = table_of(spec, tables)
    if table is None:
        return groups, text
    index = table.unflatten(0, (-1, 1, groups_of(q, kv[0])))
    rows = [group_meaning([[t], [index], []], GroupSpec().text)[0] for t in kv]  # (B, H, G, S, D)
    return [[q], [t.transpose(1, 2).flatten(0, 1) for t in rows], list(tables)], replace(spec, group_rows="").text


def added_back(gradient: Tensor, t: Tensor, table: Tensor) -> Tensor:
    """The gradient of k or v from that of the rows (B * G, H, S, D) that groups had of it."""
    each, (batch, heads, count) = gradient.shape[0] // t.shape[0], t.shape[:3]
    rows = gradient.unflatten(0, (batch, each)).transpose(1, 2).flatten(2, 3)  # (B, H, G * S, D)
    at = table.unflatten(0, (-1, 1, each)).flatten(2).expand(batch, heads, -1).long()
    held = (at >= 0) & (at < count)
    made = gradient.new_zeros(t.shape)
    return made.scatter_add_(2, torch.where(held, at, 0)[..., None].expand(rows.shape), rows * held[..., None])
