"""Extended Einsums: a cascade is a list of nodes, each an expression over tensors that is mapped, reduced or scanned.

    QK[m, p] = sum[e](Q * K)
    GM[p] = max[m](QK)
    SN[m, p] = exp(QK - GM)

A tensor has ranks; an expression broadcasts over the ranks of all that it names. The index names i and j count the
ranks that `Node.at` says; tables are looked up as everywhere else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from ..refusal import Refused, nearest
from ..symbol_text import parse
from ..symbols import INDEX_NAMES, SIZE_NAMES, Expr

MONOIDS = ("sum", "max", "min", "prod")
Ranks = tuple[str, ...]


@dataclass(frozen=True)
class Operand:
    """A tensor that comes from outside."""

    name: str
    ranks: Ranks

    def __str__(self) -> str:
        return f"{self.name}[{', '.join(self.ranks)}]"


@dataclass(frozen=True)
class Node:
    """One equation. `kind` says what happens to the values of `text` over the ranks `over`.

    map     nothing: one value for each element        opaque  an elementwise operation that no expression says
    reduce  a monoid over the ranks                    scan    the same up to each element
    last    the last element of a scan                 global  an operation that needs all of the ranks at once
    """

    name: str
    ranks: Ranks
    text: str
    kind: str = "map"
    monoid: str = ""  # of a reduction or scan; the operation of a global node
    over: Ranks = ()
    reverse: bool = False  # a scan from the last element backwards
    before: bool = False  # a scan that leaves the element itself out
    decay: str = ""  # what a scanned sum is multiplied by at each element, before the element is added
    init: str = ""  # what a scan starts from
    keep: str = ""  # elements where this is false are not visited: they change a count, never a dependency
    at: tuple[str, str] = ("p", "m")  # the ranks that i and j count
    also: tuple[str, ...] = ()  # what a global node reads besides

    @cached_property
    def expr(self) -> Expr:
        return parse(self.text)

    @cached_property
    def named(self) -> tuple[str, ...]:
        """Tensors that it reads, in order of name."""
        words = {n for text in (self.text, self.decay, self.keep, self.init) if text for n in parse(text).names}
        return tuple(sorted((words - {*INDEX_NAMES, *SIZE_NAMES}) | set(self.also)))

    def __str__(self) -> str:
        where = f" if {self.keep}" if self.keep else ""
        return f"{self.name}[{', '.join(self.ranks)}] = {self.right}{where}"

    @property
    def right(self) -> str:
        if self.kind == "map":
            return self.text
        options = (("decay", self.decay), ("init", self.init))
        inside = ", ".join((self.text, *self.also, *(f"{word}={text}" for word, text in options if text)))
        over = f"[{', '.join(self.over)}]" if self.over else ""
        return f"{self.called}{over}({inside})"

    @property
    def called(self) -> str:
        if self.kind != "scan":
            return "last" if self.kind == "last" else self.monoid
        return f"{'suffix' if self.reverse else 'prefix'}_{self.monoid}{'_before' if self.before else ''}"


@dataclass(frozen=True)
class Cascade:
    """Operands, then nodes that each name only what stands above, and which of them are asked for."""

    operands: tuple[Operand, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]

    def __post_init__(self) -> None:
        ranks = {o.name: o.ranks for o in self.operands}
        for node in self.nodes:
            for word in node.named:
                if word not in ranks:
                    raise Refused(f"tensor {word!r}", where=str(node), fits=nearest(word, ranks))
            ranks[node.name] = node.ranks
        for word in self.outputs:
            if word not in ranks:
                raise Refused(f"output {word!r}", where="cascade", fits=nearest(word, ranks))

    @cached_property
    def ranks(self) -> dict[str, Ranks]:
        return {o.name: o.ranks for o in self.operands} | {n.name: n.ranks for n in self.nodes}

    @cached_property
    def by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}

    @cached_property
    def all_ranks(self) -> Ranks:
        every = [r for ranks in self.ranks.values() for r in ranks] + [r for n in self.nodes for r in n.over]
        return tuple(dict.fromkeys(every))

    def ranks_of(self, expr: Expr, node: Node) -> frozenset[str]:
        """The ranks that an expression of a node varies over."""
        at = {"b": "b", "h": "h", "i": node.at[0], "j": node.at[1]}
        found: set[str] = set()
        for word in expr.names:
            found.update(
                self.ranks[word] if word in self.ranks else {at[word]} & set(self.all_ranks) if word in at else ()
            )
        return frozenset(found)

    def space(self, node: Node) -> Ranks:
        """All ranks that a node visits, in the cascade's own order."""
        visited = set(node.ranks) | set(node.over)
        for text in (node.text, node.decay, node.keep):
            visited |= self.ranks_of(parse(text), node) if text else set()
        return tuple(r for r in self.all_ranks if r in visited)

    def needed(self, wanted: Iterable[str]) -> tuple[Node, ...]:
        """The nodes that these depend on, in order."""
        asked = set(wanted)
        for node in reversed(self.nodes):
            if node.name in asked:
                asked.update(node.named)
        return tuple(n for n in self.nodes if n.name in asked)

    def __str__(self) -> str:
        lines = [f"in   {', '.join(map(str, self.operands))}", *map(str, self.nodes), f"out  {', '.join(self.outputs)}"]
        return "\n".join(lines)
