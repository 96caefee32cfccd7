"""Pointwise work of a graph gathered into pieces: what one loop over the rows of a tensor can do in a single sweep.

A piece reads tensors of one shape (..., C), rows of one number (..., 1), vectors (C,) and constants; its steps act
number by number or make one number of a row. A leaf module whose tensors are vectors, such as a norm, is the steps that
its forward is traced to. Every step keeps the type that torch gives its result: bfloat16 is rounded where torch rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from .nodes import op_name, writes
from .tracing import trace_function

FULL, ROW, VECTOR = "full", "row", "vector"
DTYPES = (torch.float32, torch.bfloat16)
_ONE = frozenset({"neg", "exp", "tanh", "sigmoid", "silu", "relu", "sqrt", "rsqrt", "gelu"})
_TWO = frozenset({"add", "sub", "mul", "div"})
_NORMS = {"layer_norm": ("x", "shape", "weight", "bias", "eps"), "rms_norm": ("x", "shape", "weight", "eps")}
_CASTS = frozenset({"to", "_to_copy", "type_as"})
_POWERS = {2: "square", 3: "cube", 0.5: "sqrt"}
_DEAR = frozenset({"gelu", "gelu_tanh"})  # alone they are worth a loop


@dataclass(frozen=True)
class Made:
    """The result of an earlier step, by its number."""

    step: int


@dataclass(frozen=True)
class Given:
    """A tensor that enters, by its number."""

    tensor: int


Operand = Made | Given | float
KERNELS: dict[str, Callable[[Any], tuple[Any, str | None]]] = {}  # by device: what runs a piece, or why nothing does


@dataclass(frozen=True)
class Step:
    """One operation; `dtype` is that of its result."""

    op: str
    args: tuple[Operand, ...]
    shape: str  # FULL or ROW
    dtype: torch.dtype


@dataclass(frozen=True)
class Entering:
    """What a tensor that enters must be."""

    shape: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Piece:
    """Steps over the rows of tensors (..., C); which of them leave, all FULL."""

    entering: tuple[Entering, ...]
    steps: tuple[Step, ...]
    leaving: tuple[int, ...]

    def __str__(self) -> str:
        name = lambda a: f"a{a.tensor}" if isinstance(a, Given) else f"s{a.step}" if isinstance(a, Made) else f"{a:g}"
        said = [f"s{k} = {s.op}({', '.join(map(name, s.args))})" for k, s in enumerate(self.steps)]
        return "; ".join([*said, f"gives {', '.join(f's{k}' for k in self.leaving)}"])


@dataclass(frozen=True)
class Seen:
    """What a node gave when the graph ran."""

    size: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(value: Any) -> Seen | None:
        return Seen(tuple(map(int, value.shape)), value.dtype) if isinstance(value, Tensor) else None


@dataclass(frozen=True)
class OfLeaf:
    """A tensor of a leaf module that a node calls."""

    call: fx.Node
    name: str


@dataclass(frozen=True)
class Product:
    """What a linear layer multiplies, without its bias: that is a step of the piece."""

    call: fx.Node


Source = fx.Node | OfLeaf | Product


@dataclass(frozen=True)
class Found:
    """A piece in its graph: the nodes that it stands for, in order, what enters and what leaves."""

    piece: Piece
    nodes: tuple[fx.Node, ...]
    entering: tuple[Source, ...]
    leaving: tuple[fx.Node, ...]


def rows_apart(t: Tensor) -> int | None:
    """How far the next row of a tensor (..., C) is, the rows taken as one list; None where they do not lie so."""
    if t.is_contiguous():
        return int(t.shape[-1])
    if t.stride(-1) != 1:
        return None
    step = reach = 0
    for size, stride in zip(reversed(t.shape[:-1]), reversed(t.stride()[:-1]), strict=True):
        if size > 1 and reach not in (0, stride):
            return None
        if size > 1:
            step, reach = step or stride, stride * size
    return step


def pieces(graph: fx.Graph, seen: Mapping[fx.Node, Seen], leaf: Callable[[fx.Node], nn.Module]) -> list[Found]:
    """All pieces of a graph that are worth a loop of their own, apart from each other."""
    calm = not any(map(writes, graph.nodes))  # else a product might read later what was written to since
    found = [_said(nodes, seen, leaf, products=calm) for nodes in _gathered(graph, seen, leaf)]
    return [each for each in found if each is not None]


def vectors_of(module: nn.Module) -> dict[str, Tensor] | None:
    """The tensors of a leaf module that holds vectors alone, by name; None of any other."""
    own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    if module._modules or "forward" in module.__dict__:
        return None
    plain = all(type(t) in (Tensor, nn.Parameter) and t.ndim == 1 for t in own.values())
    return own if own and plain else None


# --- which nodes belong together --------------------------------------------------------------------------------------


def _gathered(
    graph: fx.Graph, seen: Mapping[fx.Node, Seen], leaf: Callable[[fx.Node], nn.Module]
) -> Iterable[list[fx.Node]]:
    """Nodes in groups: each can run where its last node stands, since whoever reads an earlier one comes later."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    written = [place for node, place in order.items() if writes(node)]
    group_of: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if not _speaks(node, seen, leaf):
            continue
        joined = [node]
        for source in node.all_input_nodes:
            other = group_of.get(source)
            if other is None or other is joined or not _over_one(other, node, seen):
                continue
            both = sorted({*other, *joined}, key=order.__getitem__)
            apart = any(order[both[0]] < place < order[node] for place in written)
            early = any(order[user] < order[node] for n in both for user in n.users if user not in both)
            if not apart and not early:
                joined = both
        for member in joined:
            group_of[member] = joined
    return {id(group): group for group in group_of.values()}.values()


def _over_one(group: Sequence[fx.Node], node: fx.Node, seen: Mapping[fx.Node, Seen]) -> bool:
    """Whether a node works on the rows that a group works on; one number of each row fits rows of any length."""
    before, here = (_rows(nodes, seen) for nodes in (group, (node,)))
    return before[0] == here[0] and (before[1] == here[1] or 1 in (before[1], here[1]))


def _rows(nodes: Iterable[fx.Node], seen: Mapping[fx.Node, Seen]) -> tuple[tuple[int, ...], int]:
    """How many rows nodes work on, and how long these are."""
    sizes = [seen[n].size for node in nodes for n in (node, *node.all_input_nodes)]
    longest = max(sizes, key=len)
    return longest[:-1], max(size[-1] for size in sizes if size)


def _speaks(node: fx.Node, seen: Mapping[fx.Node, Seen], leaf: Callable[[fx.Node], nn.Module]) -> bool:
    """Whether a node is a step, or a leaf that may be some."""
    if node not in seen or seen[node].dtype not in DTYPES or len(seen[node].size) < 2:
        return False
    tensors = node.all_input_nodes
    if any(n not in seen or seen[n].dtype not in DTYPES for n in tensors):
        return False
    if node.op == "call_module":
        return len(tensors) == 1 and seen[tensors[0]].size == seen[node].size and vectors_of(leaf(node)) is not None
    return node.op == "call_function" and _operation(node, seen) is not None


# --- what they say ----------------------------------------------------------------------------------------------------


def _operation(node: fx.Node, seen: Mapping[fx.Node, Seen]) -> tuple[str, tuple[Any, ...]] | None:
    """A node as a step's operation and operands; None where no step says it."""
    name, args, options = op_name(node), node.args, {k: v for k, v in node.kwargs.items() if v is not None}
    same = all(_fits(n, node, seen) for n in node.all_input_nodes)
    if name in _CASTS and same:
        return ("cast", args[:1]) if not options.keys() - {"dtype"} else None
    if name == "mean" or name in _NORMS:
        return _of_a_row(name, node, seen)
    if not same:
        return None
    if name == "gelu":
        how = options.get("approximate", args[1] if len(args) > 1 else "none")
        return ("gelu_tanh" if how == "tanh" else "gelu", args[:1])
    if name == "pow" and len(args) == 2 and isinstance(args[1], int | float) and args[1] in _POWERS:
        return _POWERS[args[1]], args[:1]
    if name in _ONE and len(args) == 1 and not options:
        return name, args
    if name in _TWO and len(args) == 2 and not options and all(isinstance(a, fx.Node | int | float) for a in args):
        return name, args
    return None


def _of_a_row(name: str, node: fx.Node, seen: Mapping[fx.Node, Seen]) -> tuple[str, tuple[Any, ...]] | None:
    """Operations over whole rows: the mean of each, and norms of the last axis by vectors."""
    args: Any = node.args
    size = seen[args[0]].size
    if name == "mean":
        dims, kept = args[1] if len(args) > 1 else None, args[2] if len(args) > 2 else node.kwargs.get("keepdim")
        last = isinstance(dims, list | tuple) and len(dims) == 1 and dims[0] in (-1, len(size) - 1)
        return ("mean", args[:1]) if last and kept and "dtype" not in node.kwargs else None
    named = dict(zip(_NORMS[name], args, strict=False)) | dict(node.kwargs)
    vectors = [named[n] for n in ("weight", "bias") if named.get(n) is not None]
    if (
        len(named.get("shape", ())) != 1
        or any(seen[v].size != size[-1:] for v in vectors)
        or named.get("weight") is None
    ):
        return None
    eps = named.get("eps", 1e-5 if name == "layer_norm" else None)
    eps = torch.finfo(seen[args[0]].dtype).eps if eps is None else eps
    return name, (args[0], float(eps), *vectors)


def _fits(source: fx.Node, node: fx.Node, seen: Mapping[fx.Node, Seen]) -> bool:
    return _shape(seen[source].size, seen[node].size) is not None


def _shape(size: Sequence[int], whole: Sequence[int]) -> str | None:
    """What a tensor is beside a result."""
    if tuple(size) == tuple(whole):
        return FULL
    if tuple(size) == (*whole[:-1], 1):
        return ROW
    return VECTOR if size and math.prod(size) == size[-1] == whole[-1] else None


class _Unsaid(Exception):
    """Something in a group is no step after all."""


def _said(
    nodes: Sequence[fx.Node], seen: Mapping[fx.Node, Seen], leaf: Callable[[fx.Node], nn.Module], *, products: bool
) -> Found | None:
    """The piece of a group of nodes; None where it saves nothing, or some of it is no step after all."""
    written = _Written(max((seen[n].size for n in nodes), key=math.prod))
    values: dict[fx.Node, Operand] = {}
    try:
        for node in nodes:
            for source in (n for n in node.all_input_nodes if n not in values):
                if products and _is_product(source, nodes, seen, leaf):
                    values[source] = written.linear(source, seen[source], leaf(source))
                else:
                    values[source] = written.enters(source, seen[source], written.size)
            if node.op == "call_module":
                values[node] = written.inside(node, values[node.all_input_nodes[0]], seen, leaf(node))
            else:
                values[node] = written.step(node, values, seen, written.size)
    except _Unsaid:
        return None
    leaving = tuple(n for n in nodes if any(user not in nodes for user in n.users))
    numbers = tuple(v.step for n in leaving if isinstance(v := values[n], Made))
    if not written.worth or len(numbers) != len(leaving) or any(written.steps[k].shape != FULL for k in numbers):
        return None
    piece = Piece(tuple(written.kinds), tuple(written.steps), numbers)
    layers = (e.call for e in written.entering if isinstance(e, Product))
    return Found(piece, (*layers, *nodes), tuple(written.entering), leaving)


def _is_product(
    node: fx.Node, readers: Sequence[fx.Node], seen: Mapping[fx.Node, Seen], leaf: Callable[[fx.Node], nn.Module]
) -> bool:
    """Whether a node is a linear layer that a group alone reads. In float32: torch rounds bfloat16 behind the bias."""
    if node.op != "call_module" or seen[node].dtype != torch.float32 or any(user not in readers for user in node.users):
        return False
    module = leaf(node)
    return type(module) is nn.Linear and module.bias is not None and len(node.all_input_nodes) == 1


class _Written:
    """The steps of nodes, one after another, over rows of one size, and what enters them."""

    def __init__(self, size: tuple[int, ...]) -> None:
        self.size = size
        self.steps: list[Step] = []
        self.entering: list[Source] = []
        self.kinds: list[Entering] = []
        self.sweeps, self.dear = 0, False  # over memory, as torch does them; whether it is slow at one

    @property
    def worth(self) -> bool:
        """Whether a loop saves anything: several sweeps over memory become one, or one that torch is slow at."""
        return self.sweeps > 1 or self.dear

    def linear(self, node: fx.Node, seen: Seen, module: nn.Module) -> Made:
        bias: Any = module.bias
        product = self.enters(Product(node), seen, self.size)
        return self._add(
            "add", product, self.enters(OfLeaf(node, "bias"), Seen(tuple(bias.shape), bias.dtype), seen.size)
        )

    def enters(self, what: Source, seen: Seen, whole: tuple[int, ...]) -> Given:
        shape = _shape(seen.size, whole)
        if shape is None:
            raise _Unsaid
        self.entering.append(what)
        self.kinds.append(Entering(shape, seen.dtype))
        return Given(len(self.kinds) - 1)

    def step(
        self, node: fx.Node, values: Mapping[fx.Node, Operand], seen: Mapping[fx.Node, Seen], whole: tuple[int, ...]
    ) -> Made:
        said, shape = _operation(node, seen), _shape(seen[node].size, whole)
        if said is None or shape not in (FULL, ROW):
            raise _Unsaid
        self.sweeps += shape == FULL and said[0] != "cast"
        self.dear |= said[0] in _DEAR
        given = tuple(values[a] if isinstance(a, fx.Node) else float(a) for a in said[1])
        if said[0] in _NORMS:
            return self._norm(given, seen[node].dtype, centred=said[0] == "layer_norm")
        return self._add(said[0], *given, shape=shape, dtype=seen[node].dtype)

    def _norm(self, given: tuple[Operand, ...], dtype: torch.dtype, *, centred: bool) -> Made:
        """(x - mean) / sqrt(variance + eps), by float32 inside, times a vector and moved by one."""
        x, eps, *vectors = given
        if centred:
            x = self._add("sub", x, self._add("mean", x, shape=ROW))
        spread = self._add("add", self._add("mean", self._add("square", x), shape=ROW), eps, shape=ROW)
        whole = [self._add("mul", x, self._add("rsqrt", spread, shape=ROW))]
        for op, vector in zip(("mul", "add"), vectors, strict=False):
            whole.append(self._add(op, whole[-1], vector))
        self.steps[-1] = replace(self.steps[-1], dtype=dtype)
        return whole[-1]

    def _add(self, op: str, *args: Operand, shape: str = FULL, dtype: torch.dtype = torch.float32) -> Made:
        self.steps.append(Step(op, args, shape, dtype))
        return Made(len(self.steps) - 1)

    def inside(self, node: fx.Node, source: Operand, seen: Mapping[fx.Node, Seen], module: nn.Module) -> Operand:
        """The steps of a leaf's forward, traced on a few rows."""
        own = vectors_of(module) or {}
        few = Seen((3,) * (len(self.size) - 1) + self.size[-1:], seen[node.all_input_nodes[0]].dtype)
        try:
            traced = _forward_of(module, own, few)
        except RuntimeError:  # its channels are another axis, of which three rows are too few (GroupNorm)
            raise _Unsaid from None
        inside = {n: s for n in traced.nodes if (s := Seen.of(n.meta.get("val"))) is not None}
        x, *places = traced.find_nodes(op="placeholder")
        values = {x: source}
        for place, (name, t) in zip(places, own.items(), strict=True):
            if place.users:
                values[place] = self.enters(OfLeaf(node, name), Seen(tuple(t.shape), t.dtype), few.size)
        for each in traced.nodes:
            if each.op == "call_function":
                if any(n not in inside or n not in values for n in each.all_input_nodes):
                    raise _Unsaid
                values[each] = self.step(each, values, inside, few.size)
        (result,) = next(iter(traced.find_nodes(op="output"))).all_input_nodes
        return values[result]


def kept_by(module: nn.Module) -> tuple[Any, ...]:
    """What a leaf's forward depends on beside its tensors: its plain attributes."""
    plain = (int, float, bool, str, tuple, type(None))
    return tuple((k, v) for k, v in module.__dict__.items() if isinstance(v, plain))


def _forward_of(module: nn.Module, own: Mapping[str, Tensor], few: Seen) -> fx.Graph:
    """A leaf's forward as a graph of x and its own tensors; equal leaves have one."""
    key = (type(module), kept_by(module), few, tuple((n, tuple(t.shape), t.dtype) for n, t in own.items()))
    if key not in _TRACED:
        run = lambda x, *rest: torch.func.functional_call(module, dict(zip(own, rest, strict=True)), (x,))
        tensors = {name: t.detach() for name, t in own.items()}
        _TRACED[key] = trace_function(run, {"x": torch.empty(few.size, dtype=few.dtype), **tensors}).graph
    return _TRACED[key]


_TRACED: dict[Any, fx.Graph] = {}
