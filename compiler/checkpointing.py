"""Gradient checkpointing of a flat graph: cut where layers begin and end, each layer run again in the backward pass.

A model says which layers by the flags that its library sets: `gradient_checkpointing` (transformers, diffusers) and
`grad_checkpointing` (timm). Tracing never sees the flags; a call that trains reads them and runs the pieces.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from .quick import run_quick
from .refusal import Refused

FLAGS = ("gradient_checkpointing", "grad_checkpointing")
Again = Callable[..., Any]  # runs a function on tensors, keeping only those


@dataclass(frozen=True)
class Piece:
    """A run of nodes as a function of the values that enter it."""

    path: str  # the layer it is; "" between layers
    forward: Callable[..., tuple[Any, ...]]  # (model, *inputs): graph code, which finds its modules on the model
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    done: tuple[str, ...]  # values that nothing behind it reads


@dataclass(frozen=True)
class Cut:
    """A whole graph in pieces, in their order."""

    inputs: tuple[str, ...]
    pieces: tuple[Piece, ...]
    outputs: tuple[tuple[bool, Any], ...]  # (whether it is the name of a value, that name or a constant)


def run_graph(graph: fx.GraphModule, model: nn.Module, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """The flat outputs of a graph on a model's own modules, layers checkpointed where the model asks for it."""
    layers = _layers(model) if model.training and torch.is_grad_enabled() else {}
    if not layers:
        quickly = run_quick(graph, model, tensors)
        return type(graph).forward(model, *tensors) if quickly is None else quickly
    return _run(_cut_at(graph, tuple(layers)), model, tensors, layers)


def cut_where_asked(graph: fx.GraphModule, model: nn.Module) -> None:
    """Cut now what a checkpointed call would cut: torch.compile cannot trace that."""
    layers = _layers(model)
    if layers:
        _cut_at(graph, tuple(layers))


def unflagged(model: nn.Module) -> None:
    """Take the flags off, so that a trace is of the layers themselves; the caller puts them back."""
    for module in model.modules():
        for flag in FLAGS:
            if module.__dict__.get(flag):
                module.__dict__[flag] = False


# --- which layers -----------------------------------------------------------------------------------------------------


def _layers(model: nn.Module) -> dict[str, Again]:
    """Path of each layer that is to be run again, and what runs it."""
    flagged = [m for m in model.modules() if m.training and any(m.__dict__.get(flag) for flag in FLAGS)]
    if not flagged:
        return {}
    chosen = {layer: again for module in flagged for layer, again in _of(module, flagged)}
    found: dict[str, Again] = {}
    for path, module in model.named_modules():
        if module in chosen and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = chosen[module]
    return found


def _of(module: nn.Module, flagged: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, Again]]:
    """A flagged layer is one itself; a flagged stack means the entries of its lists, where these have no flags."""
    again = module.__dict__.get("_gradient_checkpointing_func") or functools.partial(checkpoint, use_reentrant=False)
    if any(base.__name__ == "GradientCheckpointingLayer" for base in type(module).__mro__):
        yield module, again
    elif not any(inner is not module and inner in flagged for inner in module.modules()):
        for held in module.children():
            if isinstance(held, nn.ModuleList | nn.Sequential):
                yield from ((layer, again) for layer in held.children())


# --- the cut ----------------------------------------------------------------------------------------------------------


def _cut_at(graph: fx.GraphModule, layers: tuple[str, ...]) -> Cut:
    cuts: dict[tuple[str, ...], Cut] = graph.meta.setdefault("cuts", {})
    if layers not in cuts:
        names = tuple(n.name for n in graph.graph.find_nodes(op="placeholder"))
        results: Any = next(iter(graph.graph.find_nodes(op="output"))).args[0]
        outputs = tuple((True, r.name) if isinstance(r, fx.Node) else (False, r) for r in results)
        cuts[layers] = Cut(names, tuple(_pieces(graph, _runs(graph, layers))), outputs)
    return cuts[layers]


def _runs(graph: fx.GraphModule, layers: Sequence[str]) -> list[tuple[str, list[fx.Node]]]:
    """The graph's nodes in their order, as runs that are one layer each and runs between them."""
    nodes = [n for n in graph.graph.nodes if n.op not in ("placeholder", "output")]
    spans: dict[tuple[str, str], list[int]] = {}
    for index, node in enumerate(nodes):
        for call, (path, *_) in (node.meta.get("nn_module_stack") or {}).items():
            if path in layers and node.op != "get_attr":
                spans.setdefault((call, path), []).append(index)
    runs: list[tuple[str, list[fx.Node]]] = []
    start, before = 0, ""
    for (_, path), indices in sorted(spans.items(), key=lambda item: min(item[1])):
        first, last = min(indices), max(indices) + 1
        if first < start:
            found = f"gradient checkpointing: {before} and {path} are computed in turns"
            raise Refused(found, where="graph", fits="layers one after another; train without checkpointing")
        runs += [("", nodes[start:first]), (path, nodes[first:last])]
        start, before = last, path
    runs.append(("", nodes[start:]))
    return [(path, run) for path, run in runs if run]


def _pieces(graph: fx.GraphModule, runs: Sequence[tuple[str, list[fx.Node]]]) -> Iterator[Piece]:
    last_read: dict[fx.Node, int] = {}
    for number, (_, run) in enumerate(runs):
        for node in run:
            last_read |= dict.fromkeys(node.all_input_nodes, number)
    output = next(iter(graph.graph.find_nodes(op="output")))
    last_read |= dict.fromkeys(output.all_input_nodes, len(runs))
    for number, (path, run) in enumerate(runs):
        inside = set(run)
        entering = dict.fromkeys(n for node in run for n in node.all_input_nodes if n not in inside)
        leaving = [n for n in run if last_read.get(n, number) > number]
        done = [n.name for n in entering if last_read[n] == number]
        yield Piece(
            path,
            type(_graph_of(graph, run, tuple(entering), leaving)).forward,
            tuple(n.name for n in entering),
            tuple(n.name for n in leaving),
            tuple(done),
        )


def _graph_of(
    whole: fx.GraphModule, run: Sequence[fx.Node], entering: Sequence[fx.Node], leaving: Sequence[fx.Node]
) -> fx.GraphModule:
    graph = fx.Graph()
    placed = {node: graph.placeholder(node.name) for node in entering}
    for node in run:
        placed[node] = graph.node_copy(node, lambda n: placed[n])
    graph.output(tuple(placed[node] for node in leaving))
    return fx.GraphModule(whole, graph)


# --- the run ----------------------------------------------------------------------------------------------------------


def _run(cut: Cut, model: nn.Module, tensors: Sequence[Tensor], layers: Mapping[str, Again]) -> tuple[Any, ...]:
    values: dict[str, Any] = dict(zip(cut.inputs, tensors))
    for piece in cut.pieces:
        given = [values[name] for name in piece.inputs]
        for name in piece.done:
            del values[name]
        own = functools.partial(piece.forward, model)
        answer = layers[piece.path](own, *given) if piece.path else own(*given)
        values.update(zip(piece.outputs, answer))
        del given, answer
    return tuple(values[found] if named else found for named, found in cut.outputs)
