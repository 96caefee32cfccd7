"""Which channels RoPE turns together: read from the graph by sending the numbers of channels through its half-turn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..nodes import op_name
from ..ports import Ports


def partners(ports: Ports) -> tuple[int, ...]:
    """Of each channel the one it is turned with; empty where that cannot be read, or where q and k differ."""
    found = {_partners(ports.nodes[f"{role}_nope"], ports.nodes[role]) for role in ("q", "k")}
    return found.pop() if len(found) == 1 else ()


def _partners(plain: fx.Node, rotated: fx.Node) -> tuple[int, ...]:
    """x cos + J x sin: J x of x = 1, 2, ... names them, with a minus on one of each two."""
    size = int(plain.meta["val"].shape[-1])
    for node in _products(rotated, plain):
        for turned in node.args[:2]:
            if turned is plain or not isinstance(turned, fx.Node):
                continue
            told = _sent(turned, plain, size)
            if told is not None:
                order = tuple(abs(c) - 1 for c in told)
                signs = all((told[c] > 0) != (told[p] > 0) for c, p in enumerate(order) if p < size)
                if sorted(order) == list(range(size)) and signs and all(order[order[c]] == c for c in range(size)):
                    return order
    return ()


def _products(rotated: fx.Node, plain: fx.Node) -> list[fx.Node]:
    """Multiplications between the plain tensor and the rotated one, nearest the end first."""
    queue, seen = [rotated], {rotated}
    found = []
    while queue:
        node = queue.pop(0)
        if op_name(node) == "mul":
            found.append(node)
            continue
        for source in node.all_input_nodes:
            if source not in seen and source is not plain and source.op == "call_function":
                seen.add(source)
                queue.append(source)
    return found


def _sent(end: fx.Node, plain: fx.Node, size: int) -> list[int] | None:
    """The last axis of `end` where the plain tensor holds 1 .. size; symbolic sizes are 1."""
    shape = [s if isinstance(s, int) else 1 for s in plain.meta["val"].shape]
    shape[:-1] = [1] * (len(shape) - 1)
    values: dict[fx.Node, Any] = {plain: torch.arange(1.0, size + 1).expand(shape)}
    heads = plain.meta["val"].shape[1]

    def value(node: fx.Node) -> Any:
        if node not in values:
            held = node.meta.get("val")
            if not isinstance(held, Tensor) and not isinstance(held, list | tuple):
                values[node] = 1
            elif node.op != "call_function":
                raise ValueError(node.name)
            else:
                given: Any = fx.node.map_arg((node.args, node.kwargs), value)
                args, kwargs = given
                if op_name(node) in ("view", "reshape", "_unsafe_view", "expand"):
                    args = (args[0], [1 if s == heads and k == 1 else s for k, s in enumerate(args[1])])
                target: Any = node.target
                values[node] = target(*args, **kwargs)
        return values[node]

    try:
        told = value(end)
    except (ValueError, RuntimeError, TypeError, IndexError, RecursionError):
        return None
    row = told.reshape(-1)
    return [int(c) for c in row] if row.numel() == size else None
