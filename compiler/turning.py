"""Rotary positions in the graph: what was turned, by which tensors, and which channels in pairs; or only that it was.

plain ── x cos + J x sin ── q       J of x = 1, 2, 3, 4: -3, -4, 1, 2 where halves are turned, -2, 1, -4, 3 neighbours
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .nodes import op_name

HALVES, NEIGHBOURS = "halves", "neighbours"
_AS_IT_IS = ("to", "_to_copy", "contiguous", "clone")


@dataclass(frozen=True)
class Turning:
    """plain (B, H, N, D), of which the first channels, as many as cos and sin have, are turned in these pairs."""

    plain: fx.Node
    cos: fx.Node
    sin: fx.Node
    pairs: str  # "" where it is neither of the two


def turning(node: fx.Node) -> Turning | None:
    """plain * cos + J plain * sin, the channels behind those that are turned perhaps put back behind them."""
    node = _bare(node)
    if op_name(node) == "cat":
        return _of_the_first(node) if _over_channels(node) else _of_the_new(node)
    if op_name(node) != "add":
        return None
    products = [_bare(a) for a in node.args[:2]]
    if not all(op_name(p) == "mul" for p in products):
        return None
    for first, second in (products, products[::-1]):
        for plain, cos in (first.args[:2], first.args[1::-1]):
            for turned, sin in (second.args[:2], second.args[1::-1]):
                told = sent(turned, plain) if turned is not plain else None
                if told is not None and told != list(range(1, len(told) + 1)) and _rank(plain) == 4:
                    return Turning(plain, cos, sin, _pairs(told))
    return None


def _over_channels(cat: fx.Node) -> bool:
    return (cat.args[1] if len(cat.args) > 1 else 0) in (-1, _rank(cat) - 1)


def _of_the_new(cat: fx.Node) -> Turning | None:
    """Rows behind those of a cache, which are turned already."""
    parts: Any = cat.args[0]
    return next((found for part in parts if (found := turning(part)) is not None), None)


def _of_the_first(cat: fx.Node) -> Turning | None:
    """The first part turned, what follows in what was turned handed on."""
    parts: Any = cat.args[0]
    first, *rest = parts
    found = turning(first)
    whole = _cut_from(found.plain) if found is not None else None
    if found is None or whole is None or _rank(whole) != 4:
        return None
    channels = [c for part in (found.plain, *rest) for c in sent(part, whole) or [0]]
    if channels != list(range(1, whole.meta["val"].shape[-1] + 1)):
        return None
    return Turning(whole, found.cos, found.sin, found.pairs)


def _pairs(told: list[int]) -> str:
    half = len(told) // 2
    if told == [-c for c in range(half + 1, 2 * half + 1)] + list(range(1, half + 1)):
        return HALVES
    return NEIGHBOURS if told == [c for n in range(1, 2 * half, 2) for c in (-n - 1, n)] else ""


def _cut_from(node: fx.Node) -> fx.Node | None:
    """What a slice, or one part of a split, was cut from."""
    node = _bare(node)
    if op_name(node) == "slice":
        return node.args[0]  # type: ignore[return-value]
    parts: Any = node.args[0] if node.args else None
    return parts.args[0] if op_name(parts) in ("split", "split_with_sizes", "chunk") else None


def _bare(node: Any) -> Any:
    while op_name(node) in _AS_IT_IS or _is_whole(node):
        node = node.args[0]
    return node


def _is_whole(node: Any) -> bool:
    """A slice that leaves nothing out, as a repetition of key heads writes it."""
    return op_name(node) == "slice" and [str(s) for s in node.meta["val"].shape] == [
        str(s) for s in node.args[0].meta["val"].shape
    ]


def _rank(node: Any) -> int:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.ndim if isinstance(value, Tensor) else 0


def sent(end: Any, plain: Any) -> list[int] | None:
    """The last axis of `end` where the plain tensor holds 1 .. D; symbolic sizes are 1."""
    if _rank(plain) < 2 or _rank(end) < 2 or not isinstance(plain.meta["val"].shape[-1], int):
        return None
    shape = [1] * (_rank(plain) - 1) + [plain.meta["val"].shape[-1]]
    values: dict[fx.Node, Any] = {plain: torch.arange(1.0, shape[-1] + 1).expand(shape)}
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
    return [int(c) for c in told.reshape(-1)] if told.shape[-1] == told.numel() else None


def by_place(start: fx.Node, projected: Callable[[fx.Node], bool], count: Any) -> bool:
    """Whether channels on the way to `start` are multiplied by numbers that go with the `count` places of tokens."""
    queue, seen = [start], {start}
    while queue and len(seen) < 64:
        node = queue.pop(0)
        sources = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor | list | tuple)]
        carried = [n for n in sources if reaches(n, projected)]
        beside = [n for n in sources if n not in carried]
        if op_name(node) == "mul" and carried and any(_along(n.meta["val"], count) for n in beside):
            return True
        fresh = [n for n in carried if n not in seen and not projected(n)]
        seen.update(fresh)
        queue.extend(fresh)
    return False


def reaches(start: fx.Node, projected: Callable[[fx.Node], bool]) -> bool:
    """Whether a projection is near behind a node, or the node is one."""
    queue, seen = [start], {start}
    while queue and len(seen) < 64:
        node = queue.pop(0)
        if projected(node):
            return True
        fresh = [n for n in node.all_input_nodes if n not in seen and n.op == "call_function"]
        seen.update(fresh)
        queue.extend(fresh)
    return False


def _along(value: Tensor, count: Any) -> bool:
    """Of several channels for each of the tokens."""
    return value.ndim >= 2 and value.shape[-1] != 1 and any(str(s) == str(count) for s in value.shape[:-1])
