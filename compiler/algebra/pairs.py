"""Which channels RoPE turns together: read from the graph by sending the numbers of channels through its half-turn."""

from __future__ import annotations

from torch import fx

from ..nodes import op_name
from ..ports import Ports
from ..turning import sent


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
            told = sent(turned, plain)
            if told is not None and len(told) == size:
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
