"""A graph before and after, laid side by side and folded by modules: what changed is found by the nodes' names.

A rewrite keeps the nodes that it does not touch, with their names and in their order; what is new has a new name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, zip_longest

from torch import Tensor, fx

from ..nodes import op_name
from .view import Module, Operation

_SILENT = frozenset({"placeholder", "output", "get_attr"})


@dataclass(frozen=True)
class Seen:
    """One node as it stood when the graph was looked at; a graph goes on changing while it is lowered."""

    name: str
    operation: str
    module: str
    kind: str
    shape: tuple[object, ...] = ()
    mechanism: str = ""


Line = tuple[Seen | None, Seen | None]


def seen(graph: fx.GraphModule) -> tuple[Seen, ...]:
    """The operations of a graph in order."""
    return tuple(_seen(node) for node in graph.graph.nodes if node.op not in _SILENT)


def _seen(node: fx.Node) -> Seen:
    stack = node.meta.get("nn_module_stack") or {}
    path, kind = list(stack.values())[-1] if stack else ("", "")
    value = node.meta.get("val")
    value = value[0] if isinstance(value, list | tuple) and value else value
    shape = tuple(value.shape) if isinstance(value, Tensor) else ()
    name = kind if isinstance(kind, str) else getattr(kind, "__name__", "")
    operation = op_name(node) or getattr(node.target, "__name__", str(node.target).rpartition(".")[2])
    return Seen(node.name, operation, path, name.rpartition(".")[2], shape, node.meta.get("mechanism", ""))


def layered(before: Sequence[Seen], after: Sequence[Seen]) -> tuple[Module, ...]:
    """The modules at the top, with everything inside them."""
    root = _Open("", "")
    for old, new in _side_by_side(_aligned(before, after)):
        here = new or old
        assert here is not None
        said = f"{new.operation} · {new.mechanism}" if new and new.mechanism else new.operation if new else ""
        operation = Operation(old.operation if old else "", said, _shape(here.shape), new.mechanism if new else "")
        root.at(here.module, here.kind).operations.append(operation)
    closed = root.closed()
    return closed.inside if not closed.operations else (closed,)


def _aligned(before: Sequence[Seen], after: Sequence[Seen]) -> Iterator[Line]:
    """Both in order: what is in both meets, the rest stands alone, what went before what came."""
    kept = {s.name for s in before} & {s.name for s in after}
    rest = iter(after)
    waiting = next(rest, None)
    for old in before:
        if old.name not in kept:
            yield old, None
            continue
        while waiting is not None and waiting.name != old.name:
            if waiting.name not in kept:
                yield None, waiting
            waiting = next(rest, None)
        yield old, waiting
        waiting = next(rest, None)
    while waiting is not None:
        if waiting.name not in kept:
            yield None, waiting
        waiting = next(rest, None)


def _side_by_side(lines: Iterable[Line]) -> Iterator[Line]:
    """What went and what came in its place stand in one line."""
    for whole, run in groupby(lines, key=lambda line: None not in line):
        each = list(run)
        if whole:
            yield from each
        else:
            yield from zip_longest((old for old, _ in each if old), (new for _, new in each if new))


def _shape(sizes: Sequence[object]) -> str:
    return f"({', '.join(map(str, sizes))})" if sizes else ""


@dataclass
class _Open:
    """A module that is still being filled."""

    path: str
    kind: str
    operations: list[Operation] = field(default_factory=list)
    inside: dict[str, _Open] = field(default_factory=dict)

    def at(self, path: str, kind: str) -> _Open:
        """The module at a path, made on the way."""
        here, walked = self, ""
        for part in path.split(".") if path else ():
            walked = f"{walked}.{part}" if walked else part
            here = here.inside.setdefault(walked, _Open(walked, ""))
        here.kind = here.kind or kind
        return here

    def closed(self) -> Module:
        return Module(self.path, self.kind, tuple(self.operations), tuple(m.closed() for m in self.inside.values()))
