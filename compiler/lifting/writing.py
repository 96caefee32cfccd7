"""What was read, as one attend node."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..ports import PROJECTIONS, op_name
from ..primitives.attend_spec import AttendSpec
from ..symbols import Expr
from .heads import Shaping


@dataclass
class Reading:
    """Everything that one attention turned out to be."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    score: Expr
    keep: str
    tables: list[fx.Node]
    after: str = ""
    sink: str = ""


def stand_in(old: fx.Node, new: fx.Node) -> None:
    """Let `new` be read in place of `old`. Its memory may lie otherwise, so views behind it become reshapes."""
    old.replace_all_uses_with(new)
    queue = [new]
    for node in queue:
        if op_name(node) in ("view", "_unsafe_view"):
            node.target = torch.ops.aten.reshape.default
        for user in node.users:
            if user not in queue and len(queue) < 64 and op_name(user) not in PROJECTIONS:
                queue.append(user)


def write(shaping: Shaping, found: Reading) -> tuple[fx.Node, fx.Node]:
    """The attend node and its output (B, H, N, Dv), in the dtype of v."""
    spec = AttendSpec(score=found.score.text, keep=found.keep, after=found.after, sink=found.sink)
    op: Any = torch.ops.reattend.attend.default
    attend = shaping.call(op, found.q, [found.k, found.v], list(found.tables), spec.text)
    out = shaping.call(operator.getitem, attend, 0)
    return attend, out
