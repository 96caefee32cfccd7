"""Reading a chain of pointwise operations backwards into one expression of the score and of the tensors beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..ports import op_name
from ..symbols import Expr, as_expr, build, const, name
from .index_paths import MOVES, SAME, ZERO, Index, same_size, shape_of, source_index

_UNARY = {"neg", "tanh", "sigmoid", "relu", "abs", "exp", "sqrt", "softplus"}
_BINARY = {"add", "sub", "rsub", "mul", "div", "true_divide", "maximum", "minimum", "where", "masked_fill"}
_CONSTANT = {"full", "scalar_tensor", "full_like", "zeros", "zeros_like", "new_full", "ones", "ones_like", "new_zeros"}
_OTHER = {"dropout", "slice_scatter", "nan_to_num", "clamp", "clamp_min", "native_dropout"}
READABLE = _UNARY | _BINARY | _OTHER | MOVES


class Unreadable(Exception):
    """The chain does something that no expression says; the message tells what."""


def plain_name(node: fx.Node) -> str:
    """add_ is add: in a chain that reads its result the two are one."""
    called = op_name(node)
    return called[:-1] if called.endswith("_") and not called.startswith("_") else called


class Reader:
    """Reads towards `ends`: nodes that stand for a named value (the product: s, the softmax: w)."""

    def __init__(
        self,
        ends: Callable[[fx.Node, Index], Expr | None],
        tables: list[fx.Node],
        draw: Callable[[fx.Node], fx.Node] | None = None,
    ) -> None:
        self.ends, self.tables, self.draw = ends, tables, draw
        self.chain: list[fx.Node] = []
        self.dropped: list[fx.Node] = []  # what a stable softmax subtracts, which changes nothing

    def leads(self, node: Any, is_end: Callable[[fx.Node], bool], depth: int = 40) -> bool:
        """Whether readable operations lead from a node back to an end."""
        if not isinstance(node, fx.Node) or depth == 0:
            return False
        if is_end(node):
            return True
        if plain_name(node) == "cat":
            return any(self.leads(part, is_end, depth - 1) for part in node.args[0])  # type: ignore[union-attr]
        if plain_name(node) not in READABLE:
            return False
        return any(self.leads(part, is_end, depth - 1) for part in node.args)

    def read(self, node: Any, index: Index, is_end: Callable[[fx.Node], bool]) -> Expr:
        if not isinstance(node, fx.Node):
            return as_expr(node)
        ended = self.ends(node, index)
        if ended is not None:
            return ended
        constant = constant_of(node)
        if constant is not None:
            return const(constant)
        if plain_name(node) not in READABLE or not self.leads(node, is_end):
            return self.table(node, index)
        self.chain.append(node)
        called = plain_name(node)
        if called in MOVES:
            moved = source_index(node, index)
            if moved is None:
                raise Unreadable(f"%{node.name} = {called} regroups axes in a way that has no index formula")
            return self.read(node.args[0], moved, is_end)
        return self._operation(node, called, index, is_end)

    def _operation(self, node: fx.Node, called: str, index: Index, is_end: Callable[[fx.Node], bool]) -> Expr:
        def part(arg: Any) -> Expr:
            return self.read(arg, broadcast(index, arg), is_end)

        args = node.args
        match called:
            case "dropout":
                if not (len(args) > 2 and args[2] and args[1]):
                    return part(args[0])
                if self.draw is None:
                    raise Unreadable(f"%{node.name}: active dropout of the scores")
                return part(args[0]) * self.table(self.draw(node), index)
            case "add" | "sub" | "rsub":
                alpha = node.kwargs.get("alpha", args[2] if called == "rsub" and len(args) > 2 else 1)
                top = top_of(args[1], args[0]) if called == "sub" else ()
                if top:  # softmax does not see what is subtracted from a whole row
                    self.dropped += top
                    return part(args[0])
                left, right = part(args[0]), part(args[1]) * as_expr(alpha)
                return left + right if called == "add" else left - right if called == "sub" else right - left
            case "mul":
                return part(args[0]) * part(args[1])
            case "div" | "true_divide":
                return part(args[0]) / part(args[1])
            case "where":
                return build("where", as_condition(part(args[0])), part(args[1]), part(args[2]))
            case "masked_fill":
                return build("where", as_condition(part(args[1])), part(args[2]), part(args[0]))
            case "maximum" | "minimum":
                return build(called, part(args[0]), part(args[1]))
            case "clamp" | "clamp_min":
                low, high = (*args[1:], None, None)[:2]
                value = part(args[0])
                value = value if low is None else build("maximum", value, part(low))
                return value if high is None else build("minimum", value, part(high))
            case "nan_to_num":
                return part(args[0])  # rows that keep nothing give 0 already
            case "neg":
                return -part(args[0])
            case "slice_scatter":
                return self._scattered(node, index, is_end)
        if called in _UNARY:
            return build(called, part(args[0]))
        raise Unreadable(f"%{node.name} = {called} in the chain")

    def _scattered(self, node: fx.Node, index: Index, is_end: Callable[[fx.Node], bool]) -> Expr:
        base, source, axis, start, end, step = (*node.args, *(None,) * 6)[:6]
        rank = len(index)
        axis, start, step = int(axis or 0) % rank, start or 0, step or 1  # type: ignore[arg-type]
        if not isinstance(start, int) or start < 0 or step != 1:
            raise Unreadable(f"%{node.name} = slice_scatter with a start or step that is no plain number")
        inside = index[axis] >= start
        if isinstance(end, int) and end < 2**40:
            inside = inside & (index[axis] < end)
        shifted = (*index[:axis], index[axis] - start, *index[axis + 1 :])
        return build("where", inside, self.read(source, shifted, is_end), self.read(base, index, is_end))

    def table(self, node: fx.Node, index: Index) -> Expr:
        """A look-up of a tensor that the chain does not go through; moves of a smaller tensor are looked through."""
        while plain_name(node) in MOVES and not node.target.__name__.endswith("_"):  # type: ignore[union-attr]
            moved = source_index(node, index)
            simpler = moved is not None and all(e.op in ("name", "const") for e in moved)
            if not simpler or (plain_name(node) in SAME and _changes_kind(node)):
                break
            node, index = node.args[0], moved  # type: ignore[assignment]
            constant = constant_of(node)
            if constant is not None:
                return const(constant)
        at = tuple(ZERO if same_size(size, 1) else e for size, e in zip(shape_of(node), index))
        if node not in self.tables:
            self.tables.append(node)
        return Expr("lookup", (f"t{self.tables.index(node)}", *at))


def _changes_kind(node: fx.Node) -> bool:
    """A cast between boolean and numbers, or one that rounds, changes what is looked up."""
    before, after = node.args[0].meta["val"].dtype, node.meta["val"].dtype  # type: ignore[union-attr]
    return bool(before != after)


def broadcast(index: Index, arg: Any) -> Index:
    """The index into an operand that is broadcast against the result."""
    shape = shape_of(arg)
    lead = len(index) - len(shape)
    return tuple(ZERO if same_size(size, 1) else e for size, e in zip(shape, index[lead:]))


def as_condition(e: Expr) -> Expr:
    return e if e.is_boolean or e.op == "lookup" else e.__ne__(0)


def constant_of(node: Any) -> float | None:
    """The number that a node holds everywhere, where that is written in the graph."""
    if not isinstance(node, fx.Node):
        return None
    called = op_name(node)
    if called in _CONSTANT:
        if called.startswith(("zeros", "new_zeros")):
            return 0.0
        if called.startswith("ones"):
            return 1.0
        value = node.args[0] if called == "scalar_tensor" else node.args[2 if called == "new_full" else 1]
        return float(value) if isinstance(value, int | float) else None
    if called in SAME or called in ("expand", "view", "reshape", "unsqueeze"):
        return constant_of(node.args[0])
    if node.op == "get_attr" and shape_of(node) == ():
        owner = node.graph.owning_module
        found: Any = owner
        for part in str(node.target).split("."):
            found = getattr(found, part)
        if (
            isinstance(found, torch.Tensor)
            and not isinstance(found, torch.nn.Parameter)
            and found.device.type != "meta"
        ):
            return float(found)
    return None


def top_of(top: Any, scores: Any) -> tuple[fx.Node, ...]:
    """The nodes of amax(x) or max(x)[0] of the same x, kept or detached; none where it is something else."""
    found: list[fx.Node] = []
    while isinstance(top, fx.Node):
        found.append(top)
        first = getattr(top.target, "__name__", "") == "getitem" and top.args[1] == 0
        if op_name(top) in ("amax", "max", "logsumexp"):
            return tuple(found) if top.args[0] is scores else ()
        if not first and op_name(top) not in SAME and op_name(top) not in ("unsqueeze", "expand"):
            return ()
        top = top.args[0]
    return ()


def keep_and_score(e: Expr, fills: Callable[[Expr], bool]) -> tuple[Expr, Expr]:
    """Conditions under which the score is minus infinity, taken out of it: where(c, -inf, x) keeps ~c.

    `fills(keep)`: whether a finite fill where `keep` does not hold means the same.
    """
    if e.op == "where":
        condition, yes, no = e.args
        for lowest, other, kept in ((yes, no, ~condition), (no, yes, condition)):
            if _is_lowest(lowest) and (lowest.args[0] == -math.inf or fills(kept)):
                keep, score = keep_and_score(other, fills)
                return keep & kept, score
    if e.op == "add":
        keeps, terms = const(True), []
        for arg in e.args:
            if (
                arg.op == "where" and "s" not in arg.names and any(_is_lowest(a) for a in arg.args[1:])
            ) or "s" in arg.names:
                keep, arg = keep_and_score(arg, fills)
                keeps = keeps & keep
            terms.append(arg)
        return keeps, build("add", *terms)
    return const(True), e


LOWEST = -1e4  # fp16 masks use -65504 or -1e4; nothing that is a bias comes near


def _is_lowest(e: Expr) -> bool:
    return e.op == "const" and not isinstance(e.args[0], bool) and (e.args[0] <= LOWEST or e.args[0] == -math.inf)


NAMES = {n: name(n) for n in ("b", "h", "i", "j", "s", "w")}
