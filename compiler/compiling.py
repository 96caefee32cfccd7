"""A call that torch.compile traces before its signature has a graph: the graph is made at once, beside the trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .containers import PLAIN
from .giving_way import ours

BESIDE_A_TRACE = torch.__version__ >= "2.13"  # 2.11 cannot hand a module to what runs beside its trace


def at_hand(table: Mapping[Any, Any], key: Any) -> Any:
    """What a table has under a key, or None, as a compiled graph may ask it: one that met a missing key would take it
    for missing for good, unless it also looked at how long the table is (torch 2.13 guards no key but constants)."""
    return table.get(key) if len(table) else None


def make_ready(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Prepare a hosted model for the call being traced; a no-op outside torch.compile.

    A call with other arguments than tensors and constants is captured at a graph break instead.
    """
    known = BESIDE_A_TRACE and torch.compiler.is_dynamo_compiling()
    if known and all(isinstance(v, (Tensor, *PLAIN)) for v in (*args, *kwargs.values())):
        _prepared(model, len(args), tuple(kwargs), *args, *kwargs.values())


@torch._dynamo.assume_constant_result
def _prepared(model: Any, positional: int, names: tuple[str, ...], *values: Any) -> bool:
    """Run for real while a trace is under way, on the tensors that it is traced with."""
    with torch._guards.tracing(None):  # or the exporter would take the trace's fake tensors for its own
        ours(model, "prepare")(*values[:positional], **dict(zip(names, values[positional:])))
    return True
