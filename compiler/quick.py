"""The same graph with its pointwise work in kernels, for calls that need no gradient: what runs where nothing watches.

The graph itself stays as it is, for training, compilers, exporters and readers. Its second call without gradients notes
the sizes of all values, its pieces become functions with a kernel each, and later calls run that twin. A piece looks at
what it is given each time and runs the graph's own nodes where that is not what its kernel was made for: other sizes
beside each other, a leaf that was replaced or watched. Its first result is compared with theirs, and so is its time.
Linear layers that read one input become one product (`joined_products.py`).
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from .faster import Faster
from .handed_modules import Handed, hand_modules
from .joined_products import Joined, side_by_side
from .leaves import acts_as
from .pointwise import (
    DTYPES,
    FULL,
    KERNELS,
    VECTOR,
    Entering,
    Found,
    OfLeaf,
    Piece,
    Product,
    Seen,
    Source,
    kept_by,
    pieces,
    rows_apart,
)
from .primitives.operator import watching

log = logging.getLogger("reattend")
_LEAST = 1 << 13  # numbers of a tensor; a kernel's call costs more than it saves on fewer
_MOST_CALLS = 64  # after which a graph without work of some length is not looked at again
_KEY, NEVER = "quick", "never"
aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default
_METHODS: dict[Any, str] = {  # torch finds a method in a third of the time that an operator's name takes
    aten.view.default: "view", aten.reshape.default: "reshape", aten.expand.default: "expand",
    aten.transpose.int: "transpose", aten.permute.default: "permute", aten.unsqueeze.default: "unsqueeze",
    aten.contiguous.default: "contiguous", aten.sym_size.int: "size", aten.add.Tensor: "add", aten.mul.Tensor: "mul",
}  # fmt: skip
Attends = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float | None], Tensor | None]
ATTENDS: dict[str, Attends] = {}  # by device: q, k, v, a bias of every key, causal, scale; None where it cannot


def run_quick(graph: fx.GraphModule, model: nn.Module, tensors: Sequence[Tensor]) -> tuple[Any, ...] | None:
    """The flat outputs by the graph's twin; None where the graph itself is to run."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    state = graph.meta.setdefault(_KEY, _Calls())
    if state is NEVER or watching() or any(type(t) is not Tensor or t.device.type not in KERNELS for t in tensors):
        return None
    if isinstance(state, _Twin) and state.is_for(tensors):
        return type(state.graph).forward(model, *state.modules.of(model), *tensors)
    if isinstance(state, _Calls) and not state.enough():
        return None
    noted = _Noting(model, graph.graph)
    answer: tuple[Any, ...] = noted.run(*tensors)
    made = _twin(graph, model, noted.seen, _largest(tensors))
    graph.meta[_KEY] = made or (state.again() if isinstance(state, _Calls) else NEVER)
    return answer


def never_quick(graph: fx.GraphModule) -> None:
    """This graph runs as it stands: a recipe's `target: eager` asks for torch alone."""
    graph.meta[_KEY] = NEVER


_NOTED: ContextVar[list[Piece] | None] = ContextVar("_NOTED", default=None)


def pieces_of(run: Callable[[], object]) -> list[Piece]:
    """The pieces that calls of a model new to them become."""
    noted: list[Piece] = []
    token = _NOTED.set(noted)
    try:
        with torch.no_grad():
            for _ in range(2):
                run()
    finally:
        _NOTED.reset(token)
    return list(dict.fromkeys(noted))


class _Calls:
    """Calls without gradients so far, and at how many of them the sizes are noted: a call of one token has no work."""

    def __init__(self, look_at: int = 2) -> None:
        self.count, self.look_at = 0, look_at

    def enough(self) -> bool:
        self.count += 1
        return self.count >= self.look_at

    def again(self) -> Any:
        return _Calls(2 * self.look_at) if self.look_at < _MOST_CALLS else NEVER


@dataclass(frozen=True)
class _Twin:
    """A graph's twin, and up to which size of the largest input it is one: short calls show no work for kernels."""

    graph: fx.GraphModule
    modules: Handed
    until: float

    def is_for(self, tensors: Sequence[Tensor]) -> bool:
        return self.until == math.inf or _largest(tensors) <= self.until


def _largest(tensors: Sequence[Tensor]) -> int:
    return max((t.numel() for t in tensors), default=0)


class _Noting(fx.Interpreter):
    """Runs a graph on a model's own modules and notes what every node gives."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.seen: dict[fx.Node, Seen] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if (seen := Seen.of(value)) is not None:
            self.seen[n] = seen
        return value


def _twin(graph: fx.GraphModule, model: nn.Module, seen: dict[fx.Node, Seen], largest: int) -> _Twin | None:
    """The graph with its pieces as calls, as sizes beside such inputs show them; None where nothing is gained."""
    leaf = lambda node: model.get_submodule(str(node.target))
    long = {node for node, value in seen.items() if math.prod(value.size) >= _LEAST}
    found = [each for each in pieces(graph.graph, seen, leaf) if not long.isdisjoint(each.leaving)]
    attention = {node for node in long if _is_attention(node)}
    inside = {node for each in found for node in each.nodes}
    joined = side_by_side(graph.graph, leaf, apart=inside)
    if not found and not attention and not joined:
        return None
    at = {each.nodes[-1]: each for each in found}
    together = {nodes[0]: nodes for nodes in joined}
    paths = {str(node.target) for node in graph.graph.find_nodes(op="call_module")}
    twin = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        if node in at:
            _place(twin, at[node], made, leaf)
        elif node in together:
            _join(twin, together[node], made)
        elif node not in inside and node not in made:
            made[node] = twin.node_copy(node, made.__getitem__)
            if node in attention:
                made[node].target = _attended
            elif joined and node.target is aten.view.default:
                _by_method(made[node], "reshape")  # columns of a wider product are no memory of their own
            elif node.target in _METHODS and not node.kwargs:
                _by_method(made[node], _METHODS[node.target])
    modules = hand_modules(twin, lambda path: path in paths)
    twin.lint()
    if (noted := _NOTED.get()) is not None:
        noted += [each.piece for each in found]
    return _Twin(fx.GraphModule(model, twin), modules, math.inf if found or attention else 4 * largest)


def _by_method(node: fx.Node, name: str) -> None:
    node.op, node.target = "call_method", name


def _is_attention(node: fx.Node) -> bool:
    """Whether a node is torch's one call, of all that is in its first arguments."""
    return node.target is _SDPA and not (len(node.args) > 4 and node.args[4]) and "dropout_p" not in node.kwargs


_faster = Faster()


def _attended(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0, causal: bool = False,
    *, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """Torch's attention, or what was found to be faster for such a call."""

    def torchs() -> Any:
        options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
        return nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout, causal, **options)

    if (mask is not None and mask.shape[1:3] != (1, 1)) or q.dtype not in DTYPES or q.numel() < _LEAST:
        return torchs()
    about = (size.bit_length() for size in (q.shape[0] * q.shape[1], q.shape[2], k.shape[2]))  # lengths differ by call
    kind = ("attention", *about, q.shape[3], v.shape[3], mask is None, causal, q.dtype, torch.get_num_threads())
    return _faster(kind, torchs, lambda: ATTENDS["cpu"](q, k, v, mask, causal, scale))


def _place(twin: fx.Graph, found: Found, made: dict[fx.Node, fx.Node], leaf: Callable[[fx.Node], nn.Module]) -> None:
    """A call of the piece, given the leaf modules that its nodes call and what they read, and its results."""
    leaves = [n for n in found.nodes if n.op == "call_module"]
    outside = list(dict.fromkeys(n for node in found.nodes for n in node.all_input_nodes if n not in found.nodes))
    run = _Run(found, leaves, [leaf(n) for n in leaves], outside)

    def pointwise(*given: Any) -> Any:
        return run(given)

    pointwise.__name__ = f"pointwise_{len(twin.nodes)}"
    call = twin.call_function(pointwise, (*(twin.get_attr(str(n.target)) for n in leaves), *(made[n] for n in outside)))
    for k, node in enumerate(found.leaving):
        made[node] = twin.call_function(operator.getitem, (call, k))


def _join(twin: fx.Graph, layers: Sequence[fx.Node], made: dict[fx.Node, fx.Node]) -> None:
    """One call for linear layers of one input, and the results of each."""
    joined = Joined()

    def side_by_side(*given: Any) -> Any:
        return joined(*given)

    x = made[layers[0].all_input_nodes[0]]
    call = twin.call_function(side_by_side, (x, *(twin.get_attr(str(n.target)) for n in layers)))
    for k, node in enumerate(layers):
        made[node] = twin.call_function(operator.getitem, (call, k))


class _Run:
    """One piece at its place: given the leaf modules and tensors that its nodes read, it gives what leaves."""

    def __init__(
        self, found: Found, leaves: Sequence[fx.Node], modules: Sequence[nn.Module], outside: Sequence[fx.Node]
    ) -> None:
        self.piece = found.piece
        self.made_for = [(type(m), [] if type(m) is nn.Linear else kept_by(m)) for m in modules]
        self.plainly = _as_function(found, leaves, outside)
        place = {node: k for k, node in enumerate((*leaves, *outside))}
        self.read = [_reader(source, place) for source in found.entering]
        self.whole = next(k for k, e in enumerate(found.piece.entering) if e.shape == FULL)
        self.named = str(self.piece)

    def __call__(self, given: Sequence[Any]) -> Sequence[Any]:
        entering = self._entering(given)
        if entering is None:
            return self.plainly(*given)
        *rows, width = entering[self.whole].shape
        kind = (self.named, math.prod(rows).bit_length(), width, torch.get_num_threads())
        answer: Sequence[Any] = _pieces(kind, lambda: self.plainly(*given), lambda: self._by_kernel(entering))
        return answer

    def _entering(self, given: Sequence[Any]) -> list[Tensor] | None:
        """The tensors as the kernel takes them; None where they, or the leaves, are not what it was made for."""
        for module, (kind, kept) in zip(given, self.made_for, strict=False):
            if not acts_as(module, kind) or any(module.__dict__.get(name) != value for name, value in kept):
                return None
        found = [read(given) for read in self.read]
        size = found[self.whole].shape
        if size.numel() < _LEAST or not all(_is(t, e, size) for t, e in zip(found, self.piece.entering)):
            return None
        return found

    def _by_kernel(self, entering: Sequence[Tensor]) -> list[Tensor] | None:
        if self.kernel is None:
            return None
        like = entering[self.whole]
        leaving = [torch.empty(like.shape, dtype=self.piece.steps[k].dtype) for k in self.piece.leaving]
        self.kernel(entering, leaving)
        return leaving

    @cached_property
    def kernel(self) -> Any:
        """What runs the piece, built when it is first asked for; None where nothing does."""
        kernel, reason = KERNELS["cpu"](self.piece)
        if kernel is None:
            log.debug("pointwise work stays torch's: %s", reason)
        return kernel


_pieces = Faster(worth=1.0, turns=5)


def _reader(source: Source, place: Mapping[fx.Node, int]) -> Callable[[Sequence[Any]], Any]:
    """How a tensor that enters is had from what a piece is given."""
    if isinstance(source, OfLeaf):
        module, name = place[source.call], source.name
        return lambda given: given[module]._parameters.get(name, given[module]._buffers.get(name))
    if isinstance(source, Product):
        module, x = place[source.call], place[source.call.all_input_nodes[0]]
        return lambda given: nn.functional.linear(given[x], given[module].weight)
    at = place[source]
    return lambda given: given[at]


def _is(t: Any, wanted: Entering, size: Sequence[int]) -> bool:
    """Whether a tensor is what a kernel reads beside tensors of a size."""
    if type(t) not in (Tensor, nn.Parameter) or t.dtype != wanted.dtype or not t.is_cpu:
        return False
    shape: Sequence[int] = t.shape
    if wanted.shape == VECTOR:
        fits = t.numel() == shape[-1] == size[-1]
    else:
        fits = shape == size if wanted.shape == FULL else shape == (*size[:-1], 1)
    return fits and (t.is_contiguous() or (wanted.shape == FULL and rows_apart(t) is not None))


def _as_function(found: Found, leaves: Sequence[fx.Node], outside: Sequence[fx.Node]) -> Callable[..., Any]:
    """The piece's own nodes as a function of leaf modules and tensors."""
    graph = fx.Graph()
    placed = {node: graph.placeholder(f"m{k}") for k, node in enumerate(leaves)}
    values = {node: graph.placeholder(f"x{k}") for k, node in enumerate(outside)}
    for node in found.nodes:
        if node.op == "call_module":
            values[node] = graph.call_function(_called, (placed[node], *(values[n] for n in node.all_input_nodes)))
        else:
            values[node] = graph.node_copy(node, values.__getitem__)
    graph.output(tuple(values[node] for node in found.leaving))
    run: Callable[..., Any] = fx.GraphModule(nn.Module(), graph).forward
    return run


def _called(module: nn.Module, x: Tensor) -> Any:
    return module(x)
