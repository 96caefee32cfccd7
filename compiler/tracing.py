"""A mechanism's `forward` as a piece of graph: run once on a site's fake tensors, in the captured model's dialect."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from .live import LiveSite
from .mechanism import Aux, Mechanism, Tensors
from .primitives.attend_spec import AttendSpec
from .refusal import Refused
from .site import Site


@dataclass(frozen=True)
class Fragment:
    """The traced piece: its inputs by name ("q", "table_0", "param_w"), and what its outputs are."""

    graph: fx.GraphModule
    inputs: tuple[str, ...]
    losses: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setting:
    """What a mechanism is traced against; equal settings give equal fragments."""

    site: Site
    spec: AttendSpec

    @property
    def signature(self) -> Any:
        """The site without its name and place."""
        return replace(self.site, path="", index=0, weights=()), self.spec


def trace(mechanism: Mechanism, setting: Setting, values: Mapping[str, Tensor]) -> Fragment:
    """The graph of mechanism.forward at a site; values are fake tensors named as the fragment's inputs."""
    names = tuple(values)
    told: dict[str, tuple[str, ...]] = {}

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        output, aux = forward(mechanism, setting, dict(zip(names, tensors, strict=True)))
        told["losses"], told["buffers"] = tuple(aux.losses), tuple(aux.buffers)
        return (output, *aux.losses.values(), *aux.buffers.values())

    try:
        graph = trace_function(run, values)
    except (Refused, RuntimeError) as error:  # of torch, about sizes: memory tokens beside the keys, queries have none
        where = f"{setting.site.path}: {mechanism.slug}"
        if _past_is_missing(mechanism, values):
            found = "its forward asks for x of every key, and under a cache x is that of the new tokens alone"
            # generate() hands positions over, which may pack documents: a mechanism for one document is refused
            there = "" if "packed" in mechanism.honours else ", there with `drop: [packed]`"
            fits = f"use_cache=False (also in generate{there}), or a mechanism of q, k and v alone"
            raise Refused(found, where=where, fits=fits) from None
        if isinstance(error, Refused):
            raise error.at(where) from None
        said = f"its forward fails at this site's sizes: {str(error).splitlines()[0]}"
        raise Refused(said, where=where, fits="another mechanism here") from error
    return Fragment(graph, names, told["losses"], told["buffers"])


def _past_is_missing(mechanism: Mechanism, values: Mapping[str, Tensor]) -> bool:
    """Whether it asks for what the keys were made of, and that has fewer rows than they: looked at where it fails."""
    x = values.get("x") if "x" in sum(mechanism.wanted_ports(), ()) else None
    return x is not None and str(x.shape[1]) != str(values["k"].shape[2])  # as text: a comparison would be a guard


def trace_function(run: Callable[..., Any], values: Mapping[str, Tensor]) -> fx.GraphModule:
    """A function of tensors as a graph whose placeholders have the names of its values."""
    with torch.no_grad():
        graph = make_fx(run, pre_dispatch=True, tracing_mode="symbolic")(*values.values())
    for node, name in zip(graph.graph.find_nodes(op="placeholder"), values, strict=True):
        node.name = node.target = name
    for node in list(graph.graph.nodes):
        if "_assert_tensor_metadata" in str(node.target) or "_set_grad_enabled" in str(node.target):
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def forward(mechanism: Mechanism, setting: Setting, values: Mapping[str, Tensor]) -> tuple[Tensor, Aux]:
    """mechanism.forward on named tensors: ports, table_k, param_<name>; drawn tensors are drawn here."""
    tables = _numbered(values, "table_")
    own = {n.removeprefix("param_"): t for n, t in values.items() if n.startswith("param_")}
    live = LiveSite(setting.site, setting.spec, tuple(tables), _ports(values))
    like = next(iter(values.values()))
    for name, declared in mechanism.draws(setting.site).items():
        own[name] = declared.started(like)
    must, may = mechanism.wanted_ports()
    ports = {n: values[n] for n in (*must, *may) if n in values}
    answer = mechanism.forward(live, Tensors(own), **ports)
    output, aux = answer if isinstance(answer, tuple) else (answer, Aux())
    return output, aux


def _ports(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t for n, t in values.items() if not n.startswith(("table_", "param_"))}


def _numbered(values: Mapping[str, Tensor], prefix: str) -> list[Tensor]:
    return [values[f"{prefix}{k}"] for k in range(sum(n.startswith(prefix) for n in values))]
