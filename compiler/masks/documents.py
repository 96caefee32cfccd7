"""Packed sequences whose documents begin where positions do not go on by one: within one, positions count as indices.

d = cumsum(diff(p) != 1),   d[i] == d[j]   =>   p[i] - p[j] = i - j
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from ..nodes import args_of, op_name
from ..ports import documents_of
from ..symbols import Expr, const

ORDERS = frozenset({"le", "lt", "ge", "gt"})
COUNTED = ORDERS | {"lookup", "add", "sub", "const", "name"}


def counted(keep: Expr, nodes: Mapping[str, fx.Node]) -> Expr:
    """The same predicate, positions of one document compared by their indices."""
    conditions = keep.args if keep.op == "and" else (keep,)
    begun = [starts(nodes.get(documents_of(c))) for c in conditions]
    positions = {_bare(p) for p in begun if p is not None}
    taken = {(name, at) for name, node in nodes.items() for p, at in positions if p is _bare(node)[0]}
    tables = {name: at[len(_bare(nodes[name])[1]) :] for name, at in taken}
    found = [_by_index(c, tables) for c in conditions]
    whole: Expr = found[0]
    for condition in found[1:]:
        whole = whole & condition
    return whole if tables else keep


def starts(node: fx.Node | None) -> fx.Node | None:
    """The positions that documents are made of; None where they are made otherwise."""
    if node is None or op_name(node) != "cumsum" or node.args[1] not in (-1, node.meta["val"].ndim - 1):
        return None
    changed: Any = node.args[0]
    if op_name(changed) != "ne" or changed.args[1] != 1 or op_name(changed.args[0]) != "diff":
        return None
    positions, *rest = changed.args[0].args
    whole = positions.meta["val"].shape[-1] == node.meta["val"].shape[-1]
    return positions if whole and rest[:2] in ([1, -1], [1]) else None


def _bare(node: fx.Node) -> tuple[fx.Node, tuple[int, ...]]:
    """The tensor itself, and which of its first places were taken: positions of text are row 0 of (axes, B, N)."""
    taken: tuple[int, ...] = ()
    while op_name(node) == "expand" or (op_name(node) == "select" and node.args[1] == 0):
        if op_name(node) == "select":
            taken = (int(node.args[2]), *taken)  # type: ignore[arg-type]
        node = args_of(node)[0]
    return node, taken


def _by_index(condition: Expr, tables: Mapping[str, tuple[int, ...]]) -> Expr:
    """p[i] - 4 < p[j] as i - 4 < j; any other condition as it is."""
    if condition.op not in ORDERS:
        return condition
    sides = [[e.args[0] for e in a.walk() if e.op == "lookup"] for a in condition.args]
    whole = all(e.op in COUNTED and (e.op != "sub" or e.args[1].op == "const") for e in condition.walk())
    if not whole or any(len(side) != 1 or side[0] not in tables for side in sides):
        return condition
    lookups = [e for e in condition.walk() if e.op == "lookup"]
    if any(e.args[1 : 1 + len(at)] != tuple(map(const, at)) for e in lookups for at in [tables[e.args[0]]]):
        return condition
    return condition.replace({name: lambda *index: index[-1] for name in tables})
