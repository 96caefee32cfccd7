"""A tensor of the graph as a function of its index: symbolic interpretation, pulled from one element backwards.

`Reader.at(node, index)` gives the element of a node as an expression. Operators that create, move, compare or combine
values are read; whatever else a value comes from stays a tensor that is looked up: `leaf_node[index]`. A parameter is
always a leaf, and so is every tensor derived from one without a choice in between: a bias is data, never a formula.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from ..nodes import is_overload
from ..symbols import Expr, const, name
from .constants import constant_formula
from .frame import Frame, Unreadable, formula

Index = tuple[Expr, ...]
Handler = Callable[["Reader", fx.Node, Index], Expr]
_MADE_LIKE = ("new_ones", "new_zeros", "new_empty", "ones_like", "zeros_like", "empty_like")
CHOOSING = ("where", "masked_fill", "add", "sub")  # operators that join a mask and a bias


@dataclass(frozen=True)
class Operators:
    """What operators do to an element, by name; their handlers read the operands through the reader again."""

    handlers: Mapping[str, Handler]
    passing: frozenset[str]  # those through which a tensor over queries and keys is followed


class Reader:
    """Reads the nodes of one graph as one site sees them."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        frame: Frame,
        written: frozenset[fx.Node],
        operators: Operators,
        known: Mapping[fx.Node, Callable[[Index], Expr]] | None = None,  # nodes whose formula was found otherwise
    ) -> None:
        self.graph_module, self.frame, self.written, self.known = graph_module, frame, written, dict(known or {})
        self._operators = operators
        self.leaves: dict[str, fx.Node] = {}
        self._done: dict[tuple[fx.Node, tuple[str, ...]], Expr] = {}
        self._opaque: dict[fx.Node, str] = {}  # why a node stays a tensor
        self._learned: dict[fx.Node, bool] = {}

    def at(self, node: Any, index: Index) -> Expr:
        """The element node[index]; a number stands for itself."""
        if not isinstance(node, fx.Node):
            return const(node)
        if not is_tensor(node):
            return self.frame.size(node)
        index = tuple(const(0) if is_one(size) else e for size, e in zip(shape(node), index, strict=True))
        key = (node, tuple(e.text for e in index))
        if key not in self._done:
            self._done[key] = self._read(node, index)
        return self._done[key]

    def _leaves_of(self, node: fx.Node) -> dict[str, fx.Node]:
        return {leaf_name(n): n for n in backward_slice([node])}

    def explained(self) -> tuple[tuple[fx.Node, str], ...]:
        """The leaves, with the reason why each stayed a tensor."""
        return tuple((n, self._opaque[n]) for n in self.leaves.values() if self._opaque.get(n))

    def reasons(self) -> tuple[str, ...]:
        """Why each leaf that was used stayed a tensor."""
        return tuple(f"{n.name}: {reason}" for n, reason in self.explained())

    def _read(self, node: fx.Node, index: Index) -> Expr:
        if node in self.known:
            found = self.known[node](index)
            self.leaves |= {leaf: n for leaf, n in self._leaves_of(node).items() if leaf in _tables(found)}
            return found
        if node in self._opaque:
            return self._leaf(node, index, self._opaque[node])
        try:
            if node in self.written:
                raise Unreadable("written in place")
            if node.op == "get_attr":
                return self._constant(node, index)
            if node.op != "call_function":
                raise Unreadable("")  # an input: nothing to explain
            if self.is_learned(node) and not self._chooses(node):
                raise Unreadable("made of parameters: a bias")
            return self._call(node, index)
        except Unreadable as reason:
            return self._leaf(node, index, str(reason))

    def _call(self, node: fx.Node, index: Index) -> Expr:
        handler = self._operators.handlers.get(operator_name(node))
        if handler is None:
            raise Unreadable(f"{operator_name(node)} is not read")
        e = handler(self, node, index)
        if operator_name(node) not in self._operators.passing and any(is_dense(x) for x in e.walk()):
            raise Unreadable("computed from a tensor over queries and keys")
        return e

    def _leaf(self, node: fx.Node, index: Index, reason: str) -> Expr:
        if not index:
            raise Unreadable(f"a single number, {node.name}, that is only known when the graph runs")
        self._opaque[node] = reason
        self.leaves[leaf_name(node)] = node
        return Expr("lookup", (leaf_name(node), *index))

    def _constant(self, node: fx.Node, index: Index) -> Expr:
        tensor = attribute(self.graph_module, str(node.target))
        if isinstance(tensor, torch.nn.Parameter):
            raise Unreadable("a parameter")
        if not isinstance(tensor, torch.Tensor) or isinstance(tensor, FakeTensor) or tensor.is_meta:
            raise Unreadable("its values are not known here")
        found = constant_formula(tensor, index)
        if found is None:
            raise Unreadable("a constant of no known form")
        return found

    def is_learned(self, node: fx.Node) -> bool:
        """Whether a parameter flows into a node."""
        todo = [node]
        while todo:
            n = todo[-1]
            if n in self._learned:
                todo.pop()
            elif n.op == "get_attr":
                self._learned[n] = isinstance(attribute(self.graph_module, str(n.target)), torch.nn.Parameter)
            else:
                sources = [] if _takes_no_values(n) else n.all_input_nodes
                waiting = [a for a in sources if a not in self._learned]
                if waiting:
                    todo.extend(waiting)
                else:
                    self._learned[n] = any(self._learned[a] for a in sources)
        return self._learned[node]

    def _chooses(self, node: fx.Node) -> bool:
        """Whether a mask may be found between a learned node and its parameters."""
        todo, seen = [node], set()
        while todo:
            n = todo.pop()
            if n in seen or not self.is_learned(n):
                continue
            seen.add(n)
            if operator_name(n).split(".")[0] in CHOOSING and any(not self.is_learned(a) for a in n.all_input_nodes):
                return True
            todo.extend(n.all_input_nodes)
        return False


def _takes_no_values(node: fx.Node) -> bool:
    """Sizes, and tensors that are only made like another (x.new_ones(n, n), torch.zeros_like(x))."""
    return not is_tensor(node) or operator_name(node).split(".")[0].startswith(_MADE_LIKE)


def leaf_name(node: fx.Node) -> str:
    return f"leaf_{node.name}"


def _tables(e: Expr) -> set[str]:
    return {x.args[0] for x in e.walk() if x.op == "lookup"}


def backward_slice(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """The nodes and everything they are computed from."""
    seen: dict[fx.Node, None] = {}
    todo = list(nodes)
    while todo:
        n = todo.pop()
        if n not in seen:
            seen[n] = None
            todo.extend(n.all_input_nodes)
    return list(seen)


def is_dense(e: Expr) -> bool:
    """A lookup with one index for the query and another for the key."""
    if e.op != "lookup":
        return False
    rows = {d for d, a in enumerate(e.args[1:]) if "i" in a.names}
    columns = {d for d, a in enumerate(e.args[1:]) if "j" in a.names}
    return bool(rows - columns) and bool(columns - rows)


def is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def shape(node: Any) -> tuple[Any, ...]:
    """The sizes of a node's value; of a number, none."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else node
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def aligned(source: Any, index: Index) -> Index:
    """The index of an operand that was broadcast to where `index` points."""
    sizes = shape(source)
    own = index[len(index) - len(sizes) :]
    return tuple(const(0) if is_one(s) else e for s, e in zip(sizes, own, strict=True))


def argument(node: fx.Node, position: int, keyword: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(keyword, default)


def dtype(node: Any) -> torch.dtype:
    value = node.meta.get("val") if isinstance(node, fx.Node) else node
    if isinstance(value, torch.Tensor):
        return value.dtype
    if isinstance(value, bool):
        return torch.bool
    return torch.int64 if isinstance(value, int | torch.SymInt) else torch.float32


def is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def same_size(a: Any, b: Any) -> bool:
    return bool(formula(a) == formula(b))


def operator_name(node: fx.Node) -> str:
    """`where.self` for aten.where.self, the plain name for anything else that is called."""
    target = node.target
    if is_overload(target):
        prefix = "" if target.namespace == "aten" else f"{target.namespace}::"
        return f"{prefix}{target._opname}.{target._overloadname}"
    return getattr(target, "__name__", str(target))


def attribute(graph_module: fx.GraphModule, path: str) -> Any:
    value: Any = graph_module
    for part in path.split("."):
        value = getattr(value, part, None)
    return value


def free(count: int, index: Index) -> tuple[Expr, ...]:
    """Indices about which only their sign is known, for an operand of which every element matters."""
    taken = frozenset().union(*(e.names for e in index))
    names = [n for n in ("b", "h") if n not in taken]
    if count > len(names):
        raise Unreadable("an operator over several dimensions")
    return tuple(name(n) for n in names[:count])
