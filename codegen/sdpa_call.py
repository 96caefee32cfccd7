"""An `attend` that torch's fused attention says in one call becomes that call in the graph.

Everything kept, causal rows, or a condition on keys alone, which is one additive row of keys for all queries: fused
attention reads it without spreading it over N x M, and rows that keep nothing give 0 there too. Where generated code
is ahead of that call the attend stays as it is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from ..compiler.cost import sizes
from ..compiler.lowering import only_reads_o
from ..compiler.primitives.attend import attend_op
from ..compiler.primitives.attend_spec import CAUSAL, AttendSpec
from ..compiler.program import insert_before
from ..compiler.symbol_eval import evaluate
from ..compiler.tracing import trace_function
from .cpu.attend import ahead
from .sdpa import linear_score, why_not_softmax

_SDPA = torch.ops.aten.scaled_dot_product_attention.default
Made = dict[Any, fx.Node]  # nodes made so far in this graph, by what they say


def as_sdpa(node: fx.Node, made: Made) -> fx.Node | None:
    """The node of the one call, in front of the attend's; None where one call cannot say it."""
    args: Any = node.args
    q, kv, tables, text = args[0], list(args[1]), args[2], args[3]
    found = linear_score(str(text)) if why_not_softmax(str(text)) is None else None
    if found is None or found[1] is not None or not only_reads_o(node) or len(kv) != 2:
        return None
    k, v = kv
    spec = AttendSpec.of(str(text))
    if not all(_is_tensor(n) for n in (q, k, v)) or _size(q, 0) != _size(k, 0):
        return None
    if ahead(q.meta["val"], sizes(k.meta["val"])[2], str(text)):
        return None
    mask: fx.Node | None = None
    causal = bool(spec.conjuncts) and all(c.text == CAUSAL for c in spec.conjuncts)
    if causal:
        if spec.align != "start" and _size(q, 2) != _size(k, 2):
            return None
    elif spec.empty:  # a query without a key has a score of its own
        return None
    elif spec.keep:
        mask = _key_mask(node, spec, q, k, list(tables), made)
        if mask is None:
            return None
    options: dict[str, Any] = {"scale": found[0], "enable_gqa": _size(q, 1) != _size(k, 1)}
    with node.graph.inserting_before(node):
        return node.graph.call_function(_SDPA, (q, k, v, mask, 0.0, causal), options)


def _key_mask(node: fx.Node, spec: AttendSpec, q: Any, k: Any, tables: list[Any], made: Made) -> fx.Node | None:
    """A row (B, 1, 1, M) of 0 and -inf; made once for all attends that read the same tables."""
    if not _on_keys(spec, q, k, tables):
        return None
    key = (spec.keep, tuple(tables), q.meta["val"].dtype, _size(q, 0), _size(k, 2))
    if key not in made:
        made[key] = _row(node, spec, q, k, tables)
    return made[key]


def _row(node: fx.Node, spec: AttendSpec, q: Any, k: Any, tables: list[Any]) -> fx.Node:
    inputs = {"q": q, "k": k} | {f"t{index}": table for index, table in enumerate(tables)}

    def row(*tensors: Tensor) -> Tensor:
        named = dict(zip(inputs, tensors, strict=True))
        batch, keys = named["q"].shape[0], named["k"].shape[2]
        device = named["q"].device
        names = {
            "b": torch.arange(batch, device=device).view(-1, 1, 1, 1),
            "j": torch.arange(keys, device=device).view(1, 1, 1, -1),
        }
        keep = evaluate(spec.keep_expr, names, named, whole=frozenset("bj"))
        return torch.zeros(keep.shape, dtype=named["q"].dtype, device=device).masked_fill(~keep, -math.inf)

    traced = trace_function(row, {name: n.meta["val"] for name, n in inputs.items()})
    return insert_before(node, traced, inputs, like=node)[0][0]


def _on_keys(spec: AttendSpec, q: Any, k: Any, tables: list[Any]) -> bool:
    """Whether the predicate asks tables (B, M) or (M,) at [b, j] or [j], and no other index.

    On a GPU a mask costs the fastest kernel; there the attend looks at run time whether anything is masked at all.
    """
    if q.meta["val"].device.type != "cpu":
        return False
    size = {"b": _size(q, 0), "j": _size(k, 2)}
    for e in spec.keep_expr.walk():
        if e.op != "lookup":
            continue
        indices = [a.text for a in e.args[1:]]
        table = tables[int(e.args[0][1:])]
        if indices not in (["b", "j"], ["j"]) or not _is_tensor(table):
            return False
        if [_size(table, d) for d in range(len(indices))] != [size[n] for n in indices]:
            return False
    return spec.keep_expr.names <= {"b", "j"}


def _is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor)


def _size(node: Any, dim: int) -> str:
    return str(node.meta["val"].shape[dim])


attend_op.in_torch.append(as_sdpa)
