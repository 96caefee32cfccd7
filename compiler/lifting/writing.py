"""What was read, as one attend node."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

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


def write(shaping: Shaping, found: Reading) -> tuple[fx.Node, fx.Node]:
    """The attend node and its output (B, H, N, Dv), in the dtype of v."""
    spec = AttendSpec(score=found.score.text, keep=found.keep, after=found.after, sink=found.sink)
    op: Any = torch.ops.reattend.attend.default
    attend = shaping.call(op, found.q, [found.k, found.v], list(found.tables), spec.text)
    out = shaping.call(operator.getitem, attend, 0)
    return attend, out
