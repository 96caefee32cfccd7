"""Linear layers that read one input as one product: narrow matrices side by side are multiplied faster than one by one.

The wide matrix is a copy of the layers' weights, and a copy can grow old. Torch shares memory until one of its readers
writes: while the copy stands, what the layers hold is shared with a reader of ours, so that whoever writes to it, in
whatever way, moves it to another address first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .faster import Faster
from .leaves import acts_as
from .nodes import op_name, writes
from .ownership import address, lazy_copy

MOST = 1 << 21  # numbers of weights: a wider product keeps all cores busy by itself, and the copy costs memory
_CALM = 2  # calls that must have found the same weights before a copy is made of them
_OF_STRIDES = frozenset({"as_strided", "view_as_complex"})  # cannot read columns of a wider matrix

Layers = Sequence[Any]  # nn.Linear, or what stands in its place by now


def side_by_side(graph: fx.Graph, leaf: Callable[[fx.Node], Any], apart: Iterable[Any]) -> list[tuple[fx.Node, ...]]:
    """Calls of linear layers on one input, in order, without the nodes that are to stay apart."""
    if any(writes(node) or op_name(node) in _OF_STRIDES for node in graph.nodes):
        return []
    elsewhere, calls = set(apart), dict[Any, list[fx.Node]]()
    for node in graph.find_nodes(op="call_module"):
        module = leaf(node)
        if type(module) is nn.Linear and node not in elsewhere and len(node.args) == 1 and not node.kwargs:
            calls.setdefault((node.args[0], module.bias is None, module.weight.dtype), []).append(node)
    return [tuple(nodes) for nodes in calls.values() if len(nodes) > 1 and _numbers(map(leaf, nodes)) <= MOST]


class Joined:
    """One product for the layers of a group, while they are plain layers whose weights stay as they are."""

    def __init__(self) -> None:
        self.copy: _Copy | None = None
        self.found: tuple[tuple[int, ...], int] = (), 0  # addresses of all weights, and how many calls found them there
        self.worth_it = False  # whether calls of any kind are faster by the copy

    def __call__(self, x: Tensor, *layers: nn.Module) -> Sequence[Tensor]:
        def apart() -> list[Tensor]:
            return [layer(x) for layer in layers]

        if type(x) is not Tensor or not all(acts_as(layer, nn.Linear) for layer in layers):
            return apart()
        at = tuple(address(t) for t in _weights(layers))
        if not self._settled(at):
            return apart()
        kind = (x.numel().bit_length(), *(layer.weight.shape for layer in layers), x.dtype, torch.get_num_threads())
        rows: Sequence[Tensor] = _products(kind, apart, lambda: self._at_once(x, layers, at))
        self.worth_it |= _products.found[kind]
        if not self.worth_it:
            self.copy = None
        return rows

    def _settled(self, at: tuple[int, ...]) -> bool:
        """Whether the weights have been where they are for some calls; a copy of others is dropped."""
        before, calls = self.found
        if at != before:
            self.copy, calls = None, 0
        self.found = at, calls + 1
        return calls >= _CALM

    def _at_once(self, x: Tensor, layers: Layers, at: tuple[int, ...]) -> Sequence[Tensor] | None:
        copy = self.copy  # once: other threads may call a copy of the model, which shares this group
        if copy is None or copy.at != at:
            copy = self.copy = _Copy.of(layers)
        return None if copy is None else copy.times(x)


@dataclass(frozen=True)
class _Copy:
    """The weights of layers side by side, and readers of the memory that these are a copy of."""

    weight: Tensor
    bias: Tensor | None
    sizes: list[int]
    readers: list[Tensor]
    at: tuple[int, ...]

    @staticmethod
    def of(layers: Layers) -> _Copy | None:
        """None where torch cannot tell us of a write: a file mapped to memory, memory of other processes."""
        readers = [r for t in _weights(layers) if (r := lazy_copy(t.detach())) is not None]
        if len(readers) < len(_weights(layers)):
            return None
        weights, biases = ([r for r in readers if r.ndim == ndim] for ndim in (2, 1))
        at = tuple(map(address, readers))
        return _Copy(torch.cat(weights), torch.cat(biases) if biases else None, [len(w) for w in weights], readers, at)

    def times(self, x: Tensor) -> Sequence[Tensor]:
        return nn.functional.linear(x, self.weight, self.bias).split_with_sizes(self.sizes, -1)


def _weights(layers: Layers) -> list[Tensor]:
    return [t for layer in layers for t in layer._parameters.values() if t is not None]


def _numbers(layers: Iterable[Any]) -> int:
    return sum(int(layer.weight.numel()) for layer in layers)


_products = Faster(worth=0.97, turns=7)  # both give the same rows: a wrong choice costs little
