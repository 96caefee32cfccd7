"""The chain from a product to its softmax as an expression of the product `s`: read backwards, pointwise step by step.

Whatever is combined with the score and does not carry it is a tensor that broadcasts over the indices; it stays one and
becomes a name `@k` here, a table later. Nothing is recognised by its values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..nodes import args_of, op_name
from ..symbols import TRUE, Expr, build, const, name
from .axes import Axis, Group, Groups, aligned, all_leaves, extents, fresh, fresh_groups, leaves
from .constants import constant
from .layout import CASTS, KEEPING, argument, back, tensor_of
from .near import Unraised
from .products import Product, product_of
from .softmaxes import Softmax, shift_of

VANISHING = -1e4  # exp of this is 0 in every dtype: a score filled with it, or less, is one that is not kept
UNARY = {n: n for n in ("tanh", "sigmoid", "exp", "exp2", "log", "softplus", "relu", "elu", "sqrt", "floor", "abs")}
UNARY |= {"sin": "sin", "cos": "cos"}
BINARY = {"add": "add", "sub": "sub", "mul": "mul", "div": "truediv", "true_divide": "truediv", "pow": "pow"}
BINARY |= {"maximum": "maximum", "minimum": "minimum", "max": "maximum", "min": "minimum"}


@dataclass(frozen=True)
class Value:
    """A score: its expression where it is kept, where that is, and what it is everywhere, fills included."""

    expr: Expr
    keep: Expr = TRUE
    full: Expr | None = None

    @property
    def settled(self) -> Expr:
        """The expression everywhere."""
        return self.expr if self.keep.text == TRUE.text or self.full is None else self.full

    def moved(self, step: Callable[[Expr], Expr]) -> Value:
        """After a step that leaves fills too low to count."""
        return Value(step(self.expr), self.keep, step(self.settled))


@dataclass(frozen=True)
class Scores:
    """What a softmax is taken of."""

    value: Value
    product: Product
    out: Groups  # the product's axes
    columns: Group  # the softmax's axis, without a sink
    shape: Groups  # the softmax's input
    leaves: dict[str, tuple[fx.Node, Groups]]  # what stays a tensor, by name
    chain: frozenset[fx.Node]  # nodes that exist only to carry the scores
    finite: frozenset[str]  # masks, by their text, that fill in a finite number
    sink: Expr | None = None
    sink_at: int | None = None  # position of the sink's column, -1 for the last; None where it has none


def read_scores(softmax: Softmax) -> Scores:
    """Raise Unraised, with the node, where the softmax is not one of scores."""
    reader = _Reader()
    front = _front_of(softmax, reader)
    while front.peeled(reader):
        pass
    if front.sink is None:  # beside a sink a shift counts
        front.pass_shifts(reader, front.node)
    value = reader.read(front.node, front.groups)
    if value is None:
        raise Unraised(front.node, _why_no_score(front.node))
    for kind, number in reversed(front.factors):
        value = value.moved(lambda e, kind=kind, number=number: build(kind, e, number))  # type: ignore[misc]
    if softmax.factor != 1:
        value = value.moved(lambda e: build("mul", e, softmax.factor))
    for mask, sense in softmax.kept:
        found = reader.leaf(mask, aligned(tensor_of(mask), front.groups))
        found = found if tensor_of(mask).dtype == torch.bool else build("ne", found, 0)
        value = reader.masked(value, found if sense else ~found, const(-math.inf))
    return reader.scores(value, front.columns, front.shape, frozenset(front.inside), front.sink, front.sink_at)


@dataclass
class _Front:
    """What stands in front of a softmax and changes no score: shifts, casts and a sink's column, peeled off in turn."""

    node: fx.Node  # what is left
    dim: int  # of the softmax
    shape: Groups  # the softmax's input
    groups: Groups  # the axes of what is left
    columns: Group
    inside: set[fx.Node]  # what was peeled off
    sink: Expr | None
    sink_at: int | None = None
    factors: list[tuple[str, float]] = field(default_factory=list)  # of shifted scores, the outermost first

    def peeled(self, reader: _Reader) -> bool:
        """One node nearer to the scores; False where a node is more than front."""
        kind = op_name(self.node)
        if self.sink_at is None and self._shift_peeled():  # behind a sink's column a shift would move the sink
            return True
        if kind in CASTS | KEEPING:
            self._go(args_of(self.node)[0])
        elif kind == "cat" and self.sink is None:
            part, extra, self.sink_at = _sink_column(self.node, self.dim)
            bare = tuple(() if d == self.dim else g for d, g in enumerate(self.groups))
            self.sink = reader.leaf(*_flat(extra, bare))
            self._go_beside_a_column(part)
        elif kind in ("pad", "constant_pad_nd") and self.sink is None:
            part, number, self.sink_at = _padded_column(self.node, self.dim)
            self.sink = const(number)
            self._go_beside_a_column(part)
        else:
            return False
        return True

    def _shift_peeled(self) -> bool:
        shift, factor = shift_of(self.node, self.dim), _over_a_shift(self.node, self.dim)
        if factor is not None:
            self.factors.append(factor)
            self._go(args_of(self.node)[0])
        elif shift is not None:
            self.inside |= shift.inside
            self.node = shift.scores
        return factor is not None or shift is not None

    def pass_shifts(self, reader: _Reader, node: Any) -> None:
        """Shifts behind masks and terms, which change no weight either: the softmax takes them as its own."""
        if tensor_of(node) is None or tensor_of(node).shape != tensor_of(self.node).shape:
            return
        shift = shift_of(node, self.dim)
        if shift is not None:
            reader.shifted[node] = shift.scores
            self.inside |= shift.inside
        for inner in [shift.scores] if shift is not None else _shifted_alike(node):
            self.pass_shifts(reader, inner)

    def _go(self, inner: fx.Node) -> None:
        self.inside.add(self.node)
        self.node = inner

    def _go_beside_a_column(self, scores: fx.Node) -> None:
        self._go(scores)
        self.columns = fresh(tensor_of(scores).shape[self.dim])
        self.groups = tuple(self.columns if d == self.dim else g for d, g in enumerate(self.groups))


def _front_of(softmax: Softmax, reader: _Reader) -> _Front:
    groups = softmax.axes or fresh_groups(tensor_of(softmax.scores))
    columns = groups[softmax.dim] or (Axis(1),)
    shape = tuple(columns if d == softmax.dim else g for d, g in enumerate(groups))
    sink = _in_the_sum(softmax, reader)
    return _Front(softmax.scores, softmax.dim, shape, shape, columns, set(softmax.inside), sink)


def _over_a_shift(node: fx.Node, dim: int) -> tuple[str, float] | None:
    """A positive factor on shifted scores, (x - max) * 32: it shifts by another constant along the softmax."""
    if op_name(node) not in ("mul", "div") or not isinstance(node.args[0], fx.Node) or node.kwargs:
        return None
    number = constant(node.args[1])
    if number is None or number <= 0 or shift_of(node.args[0], dim) is None:
        return None
    return BINARY[op_name(node)], number


def _shifted_alike(node: fx.Node) -> list[Any]:
    """Where x + c in its place gives the result and c, or the same weights: sums, masks, bounds past what counts."""
    kind, given = op_name(node), node.args
    if kind in ("add", "sub") and node.kwargs.get("alpha", 1) == 1:
        return list(given[: 2 if kind == "add" else 1])
    if kind == "masked_fill":
        return [given[0]]
    if kind == "where" and len(given) == 3:
        return [x for x, other in (given[1:], given[:0:-1]) if (constant(other, buffers=True) or 0) <= VANISHING]
    if kind in ("clamp", "clamp_min", "clamp_max") or kind in CASTS | KEEPING:
        low, high = _bounds(node)
        numbers = not any(isinstance(bound, fx.Node) for bound in (low, high))
        far = numbers and (low is None or low <= VANISHING) and (high is None or high >= -VANISHING)
        return [given[0]] if far else []
    return []


def _in_the_sum(softmax: Softmax, reader: _Reader) -> Expr | None:
    """A sink that is no column, but a term of the sum that divides."""
    if not isinstance(softmax.sink, tuple):
        return None if softmax.sink is None else const(softmax.sink)
    return reader.leaf(*_flat(*softmax.sink))


def carries_scores(node: fx.Node) -> bool:
    """Whether a product of two activations is behind a node, through pointwise steps alone."""
    reader = _Reader()
    found = reader.read(node, fresh_groups(tensor_of(node)))
    return found is not None and not any(o.op == "get_attr" for p, _ in reader.products.values() for o in p.operands)


def _sink_column(node: fx.Node, dim: int) -> tuple[fx.Node, fx.Node, int]:
    """(scores, one further column, its position) of a concatenation along the softmax."""
    parts, along = node.args[0], argument(node, 1, "dim", 0)
    rank = tensor_of(node).ndim
    if along % rank != dim or len(parts) != 2:  # type: ignore[arg-type]
        raise Unraised(node, f"scores are concatenated along dimension {along}, the softmax is over {dim}")
    for k, other in ((1, 0), (0, 1)):
        if tensor_of(parts[k]).shape[dim] == 1:  # type: ignore[index]
            return parts[other], parts[k], -k  # type: ignore[index, return-value]
    raise Unraised(node, "several columns are appended to the scores, a sink is one")


def _padded_column(node: fx.Node, dim: int) -> tuple[fx.Node, float, int]:
    """(scores, the number in one further column, its position) of padding along the softmax."""
    given: tuple[Any, ...] = node.args
    scores, sides = given[:2]
    value = argument(node, 3 if op_name(node) == "pad" else 2, "value") or 0.0
    mode = argument(node, 2, "mode", "constant") if op_name(node) == "pad" else "constant"
    if mode == "constant" and dim == tensor_of(node).ndim - 1 and list(sides) in ([0, 1], [1, 0]):
        return scores, float(value), -sides[1]
    raise Unraised(node, f"scores are padded by {list(sides)}, a sink is one column along the softmax")


def _why_no_score(node: fx.Node) -> str:
    """Why there is no score: the operator where the chain of pointwise steps ends."""
    seen = 0
    while seen < 64 and node.op == "call_function":
        seen += 1
        inner = [a for a in node.all_input_nodes if tensor_of(a) is not None]
        if op_name(node) == "" and op_name(node.args[0]):  # one of several results
            node = args_of(node)[0]
            break
        if (
            op_name(node) not in (*UNARY, *BINARY, "where", "masked_fill", "clamp", "neg")
            and back(node, fresh_groups(tensor_of(node))) is None
        ):
            break
        if not inner:
            break
        node = max(inner, key=lambda n: tensor_of(n).ndim)
    kind = op_name(node) or node.op
    behind = _product_behind(node)
    if behind is not None:
        return f"between the product %{behind.name} and the softmax stands %{node.name} ({kind})"
    return f"no product of queries and keys in front of the softmax: it is taken of %{node.name} ({kind})"


def _product_behind(node: fx.Node, limit: int = 8) -> fx.Node | None:
    queue, seen = [node], 0
    while queue and seen < limit:
        current = queue.pop(0)
        seen += 1
        found = product_of(current) if current is not node else None
        if found is not None and not any(o.op == "get_attr" for o in found.operands):
            return current
        queue.extend(n for n in current.all_input_nodes if n.op == "call_function" and tensor_of(n) is not None)
    return None


class _Reader:
    def __init__(self) -> None:
        self.leaves: dict[str, tuple[fx.Node, Groups]] = {}
        self.products: dict[str, tuple[Product, Groups]] = {}
        self.values: dict[fx.Node, Value | None] = {}
        self.met: dict[fx.Node, Groups] = {}
        self.shifted: dict[fx.Node, fx.Node] = {}  # x - c, read as x
        self.finite: set[str] = set()

    def scores(
        self, value: Value, columns: Group, shape: Groups, inside: frozenset[fx.Node], sink: Expr | None, at: int | None
    ) -> Scores:
        """The main product is `s`; the terms of further ones stay tensors."""
        main = self._main()
        put = {n: self.leaf(p.node, out) for n, (p, out) in self.products.items() if n != main}
        known = {**put, main: name("s")}
        settled = Value(value.expr.replace(known), value.keep.replace(put), value.settled.replace(known))
        product, out = self.products[main]
        carrying = {n for n, v in self.values.items() if v is not None and main in v.settled.names}
        chain = frozenset({*carrying, *inside, product.node, *product.inside})
        return Scores(settled, product, out, columns, shape, self.leaves, chain, frozenset(self.finite), sink, at)

    def _main(self) -> str:
        """The product of two activations that share most axes (batch and heads); of several, the first."""

        def worse(word: str) -> tuple[int, int]:
            product, out = self.products[word]
            left, right = (set(all_leaves(g)) for g in product.operand_groups(out))
            return sum(o.op == "get_attr" for o in product.operands), -len(left & right & set(all_leaves(out)))

        return min(self.products, key=worse)

    def leaf(self, node: Any, groups: Groups) -> Expr:
        number = constant(node)
        if number is not None:
            return const(number)
        node, groups = unexpanded(node, groups)
        for known, (other, other_groups) in self.leaves.items():
            if other is node and all(leaves(a) == leaves(b) for a, b in zip(groups, other_groups)):
                return name(known)
        fresh_name = f"@{len(self.leaves)}"
        self.leaves[fresh_name] = (node, groups)
        return name(fresh_name)

    def read(self, node: Any, groups: Groups) -> Value | None:
        """None where a node carries no score."""
        if tensor_of(node) is None or node.op != "call_function":
            return None
        if node not in self.values:
            self.met[node] = groups  # a node is read once, in the axes it is first met in
            inner = self.shifted.get(node)
            self.values[node] = self._read(node, groups) if inner is None else self.read(inner, groups)
        turned = any(leaves(a) != leaves(b) for a, b in zip(self.met[node], groups, strict=True))
        return None if turned else self.values[node]  # s + s.mT: the second is another tensor

    def _read(self, node: fx.Node, groups: Groups) -> Value | None:
        product = product_of(node)
        if product is not None:
            return self._product(product, groups)
        moved = back(node, groups)
        if moved is not None:
            return self.read(*moved)
        kind = op_name(node)
        if kind in UNARY or kind == "neg":
            inner = self.read(node.args[0], groups)
            if inner is None:
                return None
            return Value(build("mul", inner.settled, -1) if kind == "neg" else build(UNARY[kind], inner.settled))
        if kind in BINARY and len(node.args) > 1 and not argument(node, 2, "rounding_mode"):
            return self._binary(node, BINARY[kind], node.args[0], node.args[1], groups)
        if kind == "rsub":
            return self._binary(node, "sub", node.args[1], node.args[0], groups)
        if kind in ("clamp", "clamp_min", "clamp_max", "hardtanh"):
            return self._clamped(node, groups)
        if kind == "masked_fill":
            return self._chosen(node.args[1], node.args[2], node.args[0], groups)
        if kind == "where" and len(node.args) == 3:
            return self._chosen(*node.args, groups)
        if kind == "slice_scatter":
            return self._scattered(node, groups)
        return None

    def _product(self, product: Product, groups: Groups) -> Value | None:
        if not any(leaves(g) for g in groups):
            return None
        word = f"s{len(self.products)}"
        self.products[word] = (product, groups)
        value = Value(build("mul", name(word), product.scale) if product.scale != 1 else name(word))
        if product.bias is None:
            return value
        bias = self._operand(product.bias, groups)
        if isinstance(bias, Value):
            return None
        return Value(
            build("add", value.expr, build("mul", bias, product.bias_scale) if product.bias_scale != 1 else bias)
        )

    def _operand(self, node: Any, groups: Groups) -> Expr | Value:
        if not isinstance(node, fx.Node):
            return const(node)
        if tensor_of(node) is None:
            return self.leaf(node, ())
        there = aligned(tensor_of(node), groups)
        return self.read(node, there) or self.leaf(node, there)

    def _binary(self, node: fx.Node, kind: str, left: Any, right: Any, groups: Groups) -> Value | None:
        if self._carries_none(left, right, groups):
            return None
        a, b = self._operand(left, groups), self._operand(right, groups)
        alpha = node.kwargs.get("alpha", 1)
        if alpha != 1:
            b = Value(build("mul", b.settled, alpha)) if isinstance(b, Value) else build("mul", b, alpha)
        if isinstance(a, Value) and isinstance(b, Value):
            if kind in ("add", "sub"):
                return Value(build(kind, a.expr, b.expr), a.keep & b.keep, build(kind, a.settled, b.settled))
            return Value(build(kind, a.settled, b.settled))
        value, other = (a, b) if isinstance(a, Value) else (b, a)
        assert isinstance(value, Value) and isinstance(other, Expr)
        if kind == "maximum" and _at_most(other, VANISHING):
            return Value(value.expr, value.keep, build(kind, value.settled, other))
        survives = kind == "add" or (kind == "sub" and value is a) or (kind in ("mul", "truediv") and _positive(other))
        if survives and not (kind == "truediv" and value is b):
            return value.moved(lambda e: build(kind, e, other) if value is a else build(kind, other, e))
        first, second = (value.settled, other) if value is a else (other, value.settled)
        return Value(build(kind, first, second))

    def _carries_none(self, left: Any, right: Any, groups: Groups) -> bool:
        found = [self.read(x, aligned(tensor_of(x), groups)) for x in (left, right) if tensor_of(x) is not None]
        return not any(found)

    def _clamped(self, node: fx.Node, groups: Groups) -> Value | None:
        inner = self.read(node.args[0], groups)
        low, high = _bounds(node)
        if inner is None or any(isinstance(x, fx.Node) for x in (low, high)):
            return None
        if low is not None and low > VANISHING:
            inner = Value(build("maximum", inner.settled, low))
        elif low is not None:
            inner = Value(inner.expr, inner.keep, build("maximum", inner.settled, low))
        if high is not None and high < -VANISHING:
            inner = Value(build("minimum", inner.settled, high))
        return inner

    def _chosen(self, condition: Any, first: Any, second: Any, groups: Groups) -> Value | None:
        """where(condition, first, second); a branch that vanishes is a mask."""
        if self._carries_none(first, second, groups):
            return None
        chosen = self.leaf(condition, aligned(tensor_of(condition), groups))
        a, b = self._branch(first, groups), self._branch(second, groups)
        if isinstance(b, Value) and _at_most(a, VANISHING):
            return self.masked(b, ~chosen, a)
        if isinstance(a, Value) and _at_most(b, VANISHING):
            return self.masked(a, chosen, b)
        settled = [x.settled if isinstance(x, Value) else x for x in (a, b)]
        return Value(build("where", chosen, *settled))

    def masked(self, value: Value, keep: Expr, fill: Any) -> Value:
        if math.isfinite(fill.args[0]):
            self.finite.add(keep.text)
        return Value(value.expr, value.keep & keep, build("where", keep, value.settled, fill))

    def _branch(self, node: Any, groups: Groups) -> Expr | Value:
        filled = constant(node, buffers=True)
        if filled is not None and filled <= VANISHING:
            return const(filled)
        return self._operand(node, groups)

    def _scattered(self, node: fx.Node, groups: Groups) -> Value | None:
        """slice_scatter over a whole dimension is its source."""
        base, source = node.args[:2]
        if extents(tensor_of(base)) == extents(tensor_of(source)):
            return self.read(source, groups)
        return None


def unexpanded(node: Any, groups: Groups) -> tuple[Any, Groups]:
    """The smallest tensor that a leaf is an expansion of."""
    best, count = (node, groups), len(all_leaves(groups))
    current, there = node, groups
    while isinstance(current, fx.Node):
        moved = back(current, there)
        if moved is None:
            break
        current, there = moved
        if len(all_leaves(there)) < count:
            best, count = (current, there), len(all_leaves(there))
    return best


def _flat(node: fx.Node, groups: Groups) -> tuple[fx.Node, Groups]:
    """Before the views that gave it dimensions of size 1."""
    node, groups = unexpanded(node, groups)
    while (moved := back(node, groups)) is not None and len(moved[1]) < len(groups):
        node, groups = moved
    return node, groups


def _bounds(node: fx.Node) -> tuple[Any, Any]:
    """(min, max) of a clamp; None where there is none."""
    if op_name(node) not in ("clamp", "clamp_min", "clamp_max", "hardtanh"):
        return None, None
    upper = op_name(node) == "clamp_max"
    return argument(node, 2 if upper else 1, "min"), argument(node, 1 if upper else 2, "max")


def _at_most(e: Any, bound: float) -> bool:
    return isinstance(e, Expr) and e.op == "const" and e.args[0] <= bound


def _positive(e: Expr) -> bool:
    return e.op == "const" and e.args[0] > 0 and torch.isfinite(torch.tensor(float(e.args[0]))).item()  # type: ignore[return-value]
