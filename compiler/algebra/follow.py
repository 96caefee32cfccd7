"""Following channels through a graph: which weights write into a space, which read from it, what happens between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, fx

from ..nodes import op_name
from ..ports import ATTEND, Ports
from .norms import Spelled, rms_norms
from .reshapes import reshaped
from .slots import Slot
from .spaces import Label, Norm, Spaces

# fmt: off
_KEPT = frozenset({"to", "_to_copy", "dropout", "clone", "contiguous", "detach", "detach_", "alias", "type_as",
                   "lift_fresh_copy", "neg"})
_POINTWISE = frozenset({"relu", "gelu", "silu", "sigmoid", "tanh", "leaky_relu", "elu", "hardswish", "mish", "softplus",
                        "pow", "exp", "sqrt", "rsqrt", "abs", "clamp", "square"})
# fmt: on


def follow(graph: fx.Graph, ports: Mapping[str, Ports]) -> Following:
    """The spaces of a raised graph, and the label of every value that has one."""
    found = Following(graph, ports)
    for node in graph.nodes:
        found.visit(node)
    return found


class Following:
    def __init__(self, graph: fx.Graph, ports: Mapping[str, Ports]) -> None:
        self.spaces = Spaces()
        self.labels: dict[fx.Node, Label] = {}
        self.order = {node: k for k, node in enumerate(graph.nodes)}
        self.rms: dict[fx.Node, Spelled] = rms_norms(graph)
        self.inside = {n for spelled in self.rms.values() for n in spelled.inside}
        self.inside |= {n for own in ports.values() for n in _between(own)}
        self.attends = {own.attend: own for own in ports.values()}

    def visit(self, node: fx.Node) -> None:
        if node in self.inside:
            return
        if node in self.rms:
            self._norm(node, "rms", self.rms[node].x, self.rms[node].weight, None, self.rms[node].neutral)
        elif node.target is ATTEND:
            self._attend(node)
        elif node.op == "get_attr":
            self._own(node)
        elif node.op == "output":
            self._output(node)
        elif node.op in ("call_function", "call_module"):
            self._operation(node)

    # --- operations ---------------------------------------------------------------------------------------------------

    def _operation(self, node: fx.Node) -> None:
        name = op_name(node)
        rule = _RULES.get(name)
        first = self.labels.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if rule is not None:
            rule(self, node)
        elif first is None and not any(s in self.labels for s in node.all_input_nodes):
            return
        elif name in _KEPT and first is not None:
            self.labels[node] = first
        elif name in _POINTWISE and first is not None:
            self.labels[node] = self._pointwise(node, first)
        elif name == "sym_size":
            return
        else:
            moved = reshaped(node, self.labels, self.spaces)
            if moved is None:
                self._pin(node)
            else:
                self.labels |= moved

    def _pin(self, node: fx.Node, reason: str = "") -> None:
        for source in node.all_input_nodes:
            if source in self.labels:
                self.spaces.pin(self.labels[source].space, reason or f"%{node.name} ({op_name(node) or node.op})")

    def _pointwise(self, node: fx.Node, before: Label) -> Label:
        made = self.spaces.new(self.spaces.sizes[before.space])
        self.spaces.tie(before.space, made)
        for space in (before.space, made):
            self.spaces.kink(space, f"%{node.name} ({op_name(node)}) goes channel by channel")
        return Label(made, before.dims)

    def _linear(self, node: fx.Node) -> None:
        self._product(node, node.args[0], node.args[1], node.args[2] if len(node.args) > 2 else None, out=0, read=1)

    def _addmm(self, node: fx.Node) -> None:
        plain = not node.kwargs or all(v == 1 for v in node.kwargs.values())
        bias, x, weight = node.args[:3]
        if plain:
            self._product(node, x, weight, bias, out=1, read=0)
        else:
            self._pin(node)

    def _matmul(self, node: fx.Node) -> None:
        weight: Any = node.args[1]
        x, turned = node.args[0], op_name(weight) in ("t", "numpy_T", "transpose")
        held = weight.args[0] if turned else weight
        if _is_weight(held) and held.meta["val"].ndim == 2:
            self._product(node, x, held, None, out=0 if turned else 1, read=1 if turned else 0)
        else:
            self._pin(node)

    def _product(self, node: fx.Node, x: Any, weight: Any, bias: Any, *, out: int, read: int) -> None:
        """y = W x + b: x is read along one axis of W, y is written along the other."""
        if not _is_weight(weight) or (bias is not None and not _is_weight(bias)):
            self._pin(node)
            return
        sizes = weight.meta["val"].shape
        label = self.labels.get(x)
        if label is not None:
            if label.dims[-1] == self.spaces.whole(label.space) and len(label.digits) == 1:
                self.spaces.read(label.space, Slot(weight.target, read, ((1, int(sizes[read])),)), node.name)
            else:
                self._pin(node, f"%{node.name} reads its channels in another order")
        slots = [Slot(weight.target, out, ((1, int(sizes[out])),))]
        if bias is not None:
            slots.append(Slot(bias.target, 0, ((1, int(sizes[out])),)))
        self._written(node, slots, -1)

    def _embedding(self, node: fx.Node) -> None:
        weight: Any = node.args[0]
        if _is_weight(weight):
            self._written(node, [Slot(weight.target, 1, ((1, int(weight.meta["val"].shape[1])),))], -1)

    def _conv(self, node: fx.Node) -> None:
        self._pin(node)
        given: tuple[Any, ...] = node.args
        weight, bias = given[1], (given[2] if len(given) > 2 else None)
        if _is_weight(weight) and (bias is None or _is_weight(bias)):
            size = int(weight.meta["val"].shape[0])
            slots = [Slot(w.target, 0, ((1, size),)) for w in (weight, bias) if w is not None]
            self._written(node, slots, 1 - node.meta["val"].ndim)

    def _written(self, node: fx.Node, slots: list[Slot], dim: int) -> None:
        space = self.spaces.new(slots[0].count, slots, node.name)
        dims: list[Any] = [None] * node.meta["val"].ndim
        dims[dim] = self.spaces.whole(space)
        self.labels[node] = Label(space, tuple(dims))

    def _own(self, node: fx.Node) -> None:
        """A parameter that is added or laid beside values (positions, a class token) writes along its last axis."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim == 0:
            return
        users = [user for user in node.users if _uses_as_value(user)]
        if users:
            axis = value.ndim - 1
            self._written(node, [Slot(str(node.target), axis, ((1, int(value.shape[axis])),))], -1)

    def _add(self, node: fx.Node) -> None:
        left, right = (self.labels.get(a) if isinstance(a, fx.Node) else None for a in node.args[:2])
        by_number = any(not isinstance(a, fx.Node) for a in node.args[:2])
        if left is not None and right is not None and node.kwargs.get("alpha", 1) == 1 and _fit(left, right):
            self.spaces.join(left.space, right.space)
            self.labels[node] = left if len(left.dims) >= len(right.dims) else right
        elif by_number and (label := left or right) is not None:
            self.labels[node] = self._pointwise(node, label)
        else:
            self._pin(node)

    def _mul(self, node: fx.Node) -> None:
        one, other = node.args[:2]
        if not isinstance(one, fx.Node) and op_name(node) == "div":
            self._pin(node)
        elif not isinstance(other, fx.Node) or not isinstance(one, fx.Node):
            label = self.labels.get(one if isinstance(one, fx.Node) else other)  # type: ignore[arg-type]
            if label is not None:
                self.labels[node] = label  # by a number: the same space
        else:
            self._of_two(node, one, other)

    def _of_two(self, node: fx.Node, one: fx.Node, other: fx.Node) -> None:
        left, right = self.labels.get(one), self.labels.get(other)
        if left is not None and right is not None and _fit(left, right) and op_name(node) == "mul":
            self._gated(node, left, right, one, other)
        elif left is not None and right is None and _single(other, left):
            self.labels[node] = left
        elif right is not None and left is None and _single(one, right) and op_name(node) == "mul":
            self.labels[node] = right
        else:
            self._pin(node)

    def _gated(self, node: fx.Node, left: Label, right: Label, one: fx.Node, other: fx.Node) -> None:
        label = left if len(left.dims) >= len(right.dims) else right
        made = self.spaces.new(self.spaces.sizes[label.space])
        for side, source in ((left, one), (right, other)):
            self.spaces.tie(side.space, made)
            self.spaces.kink(side.space, f"%{node.name} multiplies channel by channel")
            if source.op == "get_attr":
                self.spaces.diagonal(
                    side.space, Slot(str(source.target), 0, (self.spaces.whole(side.space),)), node.name
                )
        self.spaces.kink(made, f"%{node.name} multiplies channel by channel")
        self.spaces.products.append((left.space, right.space, made))
        self.labels[node] = Label(made, label.dims)

    def _layer_norm(self, node: fx.Node) -> None:
        given: tuple[Any, ...] = (*node.args, None, None, None)
        x, shape, weight, bias = given[:4]
        kind = "rms" if op_name(node) == "rms_norm" else "layer"
        if len(shape) != 1:
            self._pin(node)
        else:
            self._norm(node, kind, x, weight, bias if kind == "layer" else None, 1.0)

    def _norm(self, node: fx.Node, kind: str, x: Any, weight: Any, bias: Any, neutral: float) -> None:
        label = self.labels.get(x)
        if label is None:
            return
        if label.dims[-1] != self.spaces.whole(label.space) or not all(
            p is None or _is_weight(p) for p in (weight, bias)
        ):
            self._pin(node, f"%{node.name} normalises part of it")
            return
        after = self.spaces.new(self.spaces.sizes[label.space])
        self.spaces.tie(label.space, after)
        scale, shift = (str(p.target) if p is not None else "" for p in (weight, bias))
        for name in filter(None, (scale, shift)):
            self.spaces.diagonal(after, Slot(name, 0, (self.spaces.whole(after),)), node.name)
        where = scale.rpartition(".")[0] or f"%{node.name}"
        self.spaces.norms.append(Norm(kind, where, label.space, after, scale, shift, neutral))
        self.labels[node] = Label(after, label.dims)

    def _attend(self, node: fx.Node) -> None:
        own = self.attends.get(node)
        result = own.nodes["o"] if own is not None else node
        value = result.meta["val"]
        if isinstance(value, Tensor) and value.ndim == 4:
            heads, dim = int(value.shape[1]), int(value.shape[3])
            space = self.spaces.new(heads * dim)
            self.labels[result] = Label(space, (None, (dim, heads), None, (1, dim)))
        tables: Any = node.args[2]
        for table in tables:
            if table in self.labels:
                self.spaces.pin(self.labels[table].space, f"%{node.name} looks it up")

    def _output(self, node: fx.Node) -> None:
        cached = {n for own in self.attends.values() for n in _cache(own)}
        for source in node.all_input_nodes:
            if source in self.labels and source not in cached:
                self.spaces.pin(self.labels[source].space, f"%{source.name} is an output")


_RULES: Mapping[str, Callable[[Following, fx.Node], None]] = {
    "linear": Following._linear,
    "addmm": Following._addmm,
    "matmul": Following._matmul,
    "mm": Following._matmul,
    "embedding": Following._embedding,
    "conv1d": Following._conv,
    "conv2d": Following._conv,
    "convolution": Following._conv,
    "add": Following._add,
    "add_": Following._add,
    "sub": Following._add,
    "mul": Following._mul,
    "div": Following._mul,
    "layer_norm": Following._layer_norm,
    "rms_norm": Following._layer_norm,
}


def _is_weight(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _uses_as_value(user: fx.Node) -> bool:
    return op_name(user) in ("expand", "cat", "add", "add_", "mul", "unsqueeze", "view", "reshape", "to")


def _fit(one: Label, other: Label) -> bool:
    """Whether two values stand in each other's basis, dimension by dimension from the right."""
    short = min(len(one.dims), len(other.dims))
    longer = one if len(one.dims) > short else other
    return one.dims[-short:] == other.dims[-short:] and not any(longer.dims[:-short])


def _single(node: fx.Node, label: Label) -> bool:
    """Whether an unlabelled factor is one number for all channels."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return True
    sizes = (*(1 for _ in label.dims), *value.shape)[-len(label.dims) :]
    return all(isinstance(size, int) and size == 1 for size, dim in zip(sizes, label.dims) if dim is not None)


def _cache(own: Ports) -> Iterator[fx.Node]:
    """What an attention keeps for later calls is in its own basis: no output that anybody else reads."""
    for start in (own.nodes["k"], own.nodes["v"]):
        node: Any = start
        while isinstance(node, fx.Node):
            yield node
            if op_name(node) not in ("slice", "to", "alias", "clone", "contiguous"):
                break
            node = node.args[0]


def _between(own: Ports) -> set[fx.Node]:
    """The nodes of a rotation by position: its two outputs are the site's q and k, its inputs q_nope and k_nope."""
    found: set[fx.Node] = set()
    for role in ("q", "k"):
        if f"{role}_nope" in own.nodes:
            found |= _paths(own.nodes[f"{role}_nope"], own.nodes[role])
    return found


def _paths(start: fx.Node, end: fx.Node) -> set[fx.Node]:
    """All nodes on ways from start (left out) to end."""
    behind, queue = {end}, [end]
    while queue:
        for source in queue.pop().all_input_nodes:
            if source not in behind and source is not start and source.op == "call_function":
                behind.add(source)
                queue.append(source)
    reached, inside = {start}, set()
    for node in start.graph.nodes:
        if node in behind and any(source in reached for source in node.all_input_nodes):
            reached.add(node)
            inside.add(node)
    return inside
