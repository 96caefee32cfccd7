"""A cascade while it is written down: names that stay unique, ranks that turn out to be the same one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from .einsum import Cascade, Node, Operand, Ranks

Dim = Ranks  # the ranks that one dimension of a tensor runs over: none where its size is 1, several where it is flat


@dataclass(frozen=True)
class Held:
    """A value of the graph: the tensor that stands for it, and the ranks of its dimensions."""

    name: str
    dims: tuple[Dim, ...]

    @property
    def ranks(self) -> Ranks:
        return tuple(r for dim in self.dims for r in dim)


@dataclass
class Builder:
    """Operands and nodes so far. `same` makes two ranks one; names are settled when the cascade is asked for."""

    operands: dict[str, Operand] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    alike: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)  # looked up by their names in expressions

    def unique(self, word: str) -> str:
        """A name that no tensor or rank has yet: QK, QK2, QK3."""
        count = self.counts[word] = self.counts.get(word, 0) + 1
        return word if count == 1 else f"{word}{count}"

    def operand(self, word: str, dims: tuple[Dim, ...]) -> Held:
        name = self.unique(word)
        held = Held(name, dims)
        self.operands[name] = Operand(name, held.ranks)
        return held

    def node(self, word: str, ranks: Ranks, text: str, kind: str = "map", **more: Any) -> str:
        name = self.unique(word)
        self.nodes.append(Node(name, ranks, text, kind, **more))
        return name

    def rank(self, word: str) -> str:
        return self.unique(word)

    def find(self, rank: str) -> str:
        while rank in self.alike:
            rank = self.alike[rank]
        return rank

    def same(self, kept: str, other: str) -> None:
        """Two ranks are one; the one that is known by a letter of its own keeps it."""
        a, b = self.find(kept), self.find(other)
        if a != b:
            known, drawn = (a, b) if b.startswith("x") or not a.startswith("x") else (b, a)
            self.alike[drawn] = known

    def same_dims(self, a: Dim, b: Dim) -> None:
        if len(a) == len(b):
            for x, y in zip(a, b):
                self.same(x, y)

    def cascade(self, outputs: tuple[str, ...]) -> Cascade:
        """What was written, only what the outputs need."""
        operands = tuple(Operand(o.name, self._settled(o.ranks)) for o in self.operands.values())
        nodes = tuple(
            replace(
                n, ranks=self._settled(n.ranks), over=self._settled(n.over), at=(self.find(n.at[0]), self.find(n.at[1]))
            )
            for n in self.nodes
        )
        whole = Cascade(operands, nodes, outputs)
        needed = whole.needed(outputs)
        read = {word for node in needed for word in node.named} | set(outputs)
        return Cascade(tuple(o for o in operands if o.name in read), needed, outputs)

    def _settled(self, ranks: Ranks) -> Ranks:
        return tuple(dict.fromkeys(self.find(r) for r in ranks))
