"""A single query row behind a past: a graph needs no mask for it, and it stands at the last key.

Elsewhere rows are counted from the first key; a mechanism that compares positions would take this row for the first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from ..nodes import args_of, op_name
from ..ports import ATTEND, RESHAPING
from ..primitives.attend_spec import IN_ORDER, AttendSpec
from ..symbol_text import parse
from ..symbols import TRUE


def place_last_rows(graph: fx.Graph) -> None:
    """Every such attention says that it is causal and counts from the end, which changes no number."""
    for node in graph.nodes:
        if node.target is not ATTEND:
            continue
        q, kv, tables, text = node.args
        spec = AttendSpec.of(text)
        if q.meta["val"].shape[2] == 1 and _counts_no_rows(spec) and _grown(kv[0]):
            keep = IN_ORDER if spec.keep_expr.text == TRUE.text else spec.keep_expr & IN_ORDER
            node.args = (q, kv, tables, replace(spec, keep=keep.text, align="end").text)


def _counts_no_rows(spec: AttendSpec) -> bool:
    """Whether the spec would say the same of any row."""
    texts = (spec.keep, spec.score, spec.sink, spec.after, spec.empty)
    placed = spec.align == "end" or spec.q_positions or spec.k_positions or spec.more
    return not placed and all("i" not in parse(text).names for text in texts if text)


def _grown(keys: Any) -> bool:
    """Whether these are rows that the call was given, and new ones behind them."""
    while isinstance(keys, fx.Node) and op_name(keys) in RESHAPING:
        keys = keys.args[0]
    if not isinstance(keys, fx.Node) or op_name(keys) != "cat" or len(args_of(keys)[0]) < 2:
        return False
    past: Any = args_of(keys)[0][0]
    while past.op != "placeholder" and op_name(past) in RESHAPING:
        past = past.args[0]
    return bool(past.op == "placeholder")
