"""`attend` over keys and values as they are stored: rows of bytes, read as numbers in front of what cannot read them.

A spec says of every k and v how its rows are stored, `(bits, dim, group, dtype)` of a RowSpec, or `()` for numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from ..nodes import args_of
from .attend_grouped import copied_out
from .attend_spec import AttendSpec
from .operator import Groups
from .packed_rows import RowSpec, unpack_op

About = tuple[int | str, ...]


def row_spec(about: About) -> RowSpec | None:
    return RowSpec(*about) if about else None  # type: ignore[arg-type]


def described(rows: Sequence[RowSpec | None]) -> tuple[About, ...]:
    """How the rows of every k and v are stored, as a spec says it."""
    return tuple((r.bits, r.dim, r.group, r.dtype) if r else () for r in rows) if any(rows) else ()


def is_stored(text: str) -> bool:
    spec = AttendSpec.of(text)
    return bool(spec.stored or spec.group_rows)


def widths(kv: Sequence[Tensor], spec: AttendSpec) -> list[int]:
    """The channels of every k and v."""
    return [r.dim if r else t.shape[-1] for r, t in zip(rows_of(kv, spec), kv, strict=True)]


def rows_of(kv: Sequence[Tensor], spec: AttendSpec) -> list[RowSpec | None]:
    return [row_spec(about) for about in spec.stored] if spec.stored else [None] * len(kv)


def in_numbers(groups: Groups, text: str) -> tuple[Groups, str]:
    """The same call on the numbers that rows of bytes stand for, on the rows of each group."""
    groups, text = copied_out(groups, text)
    spec = AttendSpec.of(text)
    if not spec.stored:
        return groups, text
    (q,), kv, tables = groups
    read = [unpack_op.meaning([[t]], r.text)[0] if r else t for r, t in zip(rows_of(kv, spec), kv, strict=True)]
    return [[q], read, list(tables)], replace(spec, stored=()).text


def read_as_stored(attend: fx.Node) -> bool:
    """A call that attends unpacked rows reads the rows themselves; whether it does."""
    q, kv, tables, text = args_of(attend)
    packed = [_packed(t) for t in kv]
    spec = AttendSpec.of(str(text))
    if spec.stored or not any(packed) or not all(_fits(p, q) for p in packed if p):
        return bool(spec.stored)
    rows = [RowSpec.of(str(p.args[1])) if p else None for p in packed]
    read = [args_of(p)[0] if p else t for p, t in zip(packed, kv, strict=True)]
    attend.args = (q, read, tables, replace(spec, stored=described(rows)).text)
    for unread in dict.fromkeys((*kv, *packed)):
        if unread is not None and not unread.users:
            attend.graph.erase_node(unread)
    return True


def _packed(node: fx.Node) -> fx.Node | None:
    """The call whose numbers these are."""
    of = node.args[0] if node.op == "call_function" and len(node.args) == 2 and node.args[1] == 0 else None
    return of if isinstance(of, fx.Node) and of.target is unpack_op.op else None


def _fits(packed: fx.Node, q: fx.Node) -> bool:
    return getattr(torch, RowSpec.of(str(packed.args[1])).dtype) == q.meta["val"].dtype
