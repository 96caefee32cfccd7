"""Whether a mask can leave a query without keys: there a finite fill means equal weights, and minus infinity does not.

scores.masked_fill(mask, -1e9) keeps ~mask wherever every row keeps something; else the fill stays part of the score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..symbol_eval import evaluate
from ..symbols import Expr

_SIZES = (2, 2, 9, 9)  # b, h, i, j where a table does not tell


def always_keeps(keep: Expr, tables: Sequence[fx.Node]) -> bool:
    """Whether every row keeps a key. A condition on keys alone is padding: no sequence is padding only."""
    if "i" not in keep.names:
        return True
    try:
        values = {f"t{k}": _value(tables[k], {}) for k in _looked_up(keep)}
        b, h, n, m = _sizes(keep, values)
        at = {"b": torch.arange(b).view(b, 1, 1, 1), "h": torch.arange(h).view(1, h, 1, 1)}
        at |= {"i": torch.arange(n).view(1, 1, n, 1), "j": torch.arange(m)}
        kept: Tensor = torch.as_tensor(evaluate(keep, at, values)) != 0
    except _Unknown:
        return False
    return bool(kept.expand(b, h, n, m).any(-1).all())


class _Unknown(Exception):
    """A value that only a call of the model tells."""


def _looked_up(e: Expr) -> list[int]:
    return sorted({int(x.args[0][1:]) for x in e.walk() if x.op == "lookup"})


def _sizes(keep: Expr, values: dict[str, Tensor]) -> tuple[int, ...]:
    found: dict[str, list[int]] = {}
    for x in keep.walk():
        if x.op == "lookup":
            for size, index in zip(values[x.args[0]].shape, x.args[1:]):
                found.setdefault(index.text, []).append(size)
    return tuple(min(found.get(n, [size])) for n, size in zip("bhij", _SIZES))


def _value(node: Any, known: dict[fx.Node, Any]) -> Any:
    """What a node holds whatever the model is called with; sizes as in the example call."""
    if isinstance(node, torch.SymInt):
        return node.node.hint
    if not isinstance(node, fx.Node):
        return node
    if node not in known:
        known[node] = _computed(node, known)
    return known[node]


def _computed(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    said = node.meta.get("val")
    if isinstance(said, torch.SymInt):
        return said.node.hint
    if node.op == "get_attr":
        found: Any = node.graph.owning_module
        for part in str(node.target).split("."):
            found = getattr(found, part)
        if not isinstance(found, Tensor) or type(found) is not Tensor or found.device.type == "meta":
            raise _Unknown
        return found
    if node.op != "call_function":
        raise _Unknown
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: _value(n, known))
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]
