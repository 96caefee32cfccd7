"""A captured model on its way through the passes: graph, sites and their ports, new tensors, what has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from .draft import Draft
from .from_seed import from_seed
from .mechanism import Mechanism, Param
from .ports import Ports
from .refusal import Refused
from .site import Site
from .tracing import Fragment, Setting

_PLACE = ("site", "nn_module_stack", "mechanism")  # where a node belongs


@dataclass(frozen=True)
class Change:
    """One mechanism put at one site: enough to say it, to run it alone and to replay it."""

    site: Site
    mechanism: Mechanism
    setting: Setting
    fragment: Fragment
    before: str  # the spec text of the attention that stood here
    own: Mapping[str, Tensor] = field(default_factory=dict)  # its new parameters and buffers, by fragment input
    tensors: tuple[str, ...] = ()  # their names in the graph
    dropped: tuple[str, ...] = ()

    def __str__(self) -> str:
        lost = f" drop={','.join(self.dropped)}" if self.dropped else ""
        return f"{self.site.path}: {self.mechanism.part} {self.mechanism!r} ({self.mechanism.kind}){lost}"


@dataclass
class Store:
    """The new tensors of all graphs of one optimized model, by full name: made once, whatever the signature."""

    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)  # layers that stand in place of the model's own
    grams: dict[str, Tensor] = field(default_factory=dict)  # of what layers read, while a first call is decided

    def parameter(self, name: str, declared: Param, like: Tensor, start: Tensor | None = None) -> nn.Parameter:
        if name not in self.parameters:
            made = _filled(name, declared, like)
            self.parameters[name] = nn.Parameter(made if start is None else start.to(made))
        return _of_shape(self.parameters[name], name, declared)  # type: ignore[return-value]

    def get(self, name: str) -> Tensor:
        return self.parameters[name] if name in self.parameters else self.buffers[name]

    def buffer(self, name: str, declared: Param, like: Tensor) -> Tensor:
        if name not in self.buffers:
            self.buffers[name] = _filled(name, declared, like)
        return _of_shape(self.buffers[name], name, declared)


def _of_shape(tensor: Tensor, name: str, declared: Param) -> Tensor:
    """A tensor made for one signature may not fit the sizes of another: a grid's biases with a larger image."""
    if tuple(tensor.shape) != tuple(declared.shape):
        raise Refused(f"{name} is {(*tensor.shape,)}, these sizes need {(*declared.shape,)}")
    return tensor


@dataclass
class Program:
    graph: fx.GraphModule
    sites: tuple[Site, ...]
    ports: dict[str, Ports]
    store: Store
    prefix: str = ""  # where the graph's module stands in the whole model, if it is a part of one
    training: bool = False  # a graph of train()
    whole_model: int = 0  # whole-model passes that were taken
    changes: list[Change] = field(default_factory=list)
    losses: list[tuple[str, fx.Node]] = field(default_factory=list)
    buffers: list[tuple[str, fx.Node]] = field(default_factory=list)
    traces: list[tuple[str, fx.Node]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    replaced: dict[str, nn.Module] = field(default_factory=dict)  # the store's modules that this graph calls
    fragments: dict[Any, Any] = field(default_factory=dict)  # traced once per distinct site signature

    @property
    def changes_shape(self) -> bool:
        """Whether a whole-model pass left the output with another shape, as token merging without unmerge does."""
        before, after = self.graph.meta.get("output_shapes"), output_shapes(self.graph)
        return bool(self.whole_model) and before is not None and before != after[: len(before)]  # named losses follow

    def site(self, path: str) -> Site:
        for site in self.sites:
            if site.path == path:
                return site
        raise Refused(f"no site {path!r}", fits=f"sites: {', '.join(s.path for s in self.sites)}")

    def copy(self) -> Program:
        """The same program on a graph of its own; parameters, new tensors and traced fragments stay shared."""
        graph = fx.Graph()
        mapped: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(self.graph.graph, mapped))
        output = next(iter(self.graph.graph.find_nodes(op="output")))
        copied = next(iter(graph.find_nodes(op="output")))
        copied.meta = dict(output.meta)
        for old, new in mapped.items():
            new.meta = dict(old.meta)
        ports = {path: own.moved(mapped) for path, own in self.ports.items()}
        fresh = Draft(self.graph, graph)
        fresh.meta = dict(self.graph.meta) | {"output_shapes": output_shapes(self.graph)}
        return replace(
            Program(fresh, self.sites, ports, self.store, self.prefix, self.training),
            notes=list(self.notes),
            fragments=self.fragments,
        )

    @property
    def fake_mode(self) -> Any:
        for node in self.graph.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch._subclasses.FakeTensor):
                return value.fake_mode
        raise Refused("the graph has no shapes", where="program")


def output_shapes(graph: fx.GraphModule) -> tuple[str, ...]:
    """The shapes of a graph's outputs, as text."""
    output = next(iter(graph.graph.find_nodes(op="output")))
    values = [n.meta.get("val") for n in output.all_input_nodes]
    return tuple(str(tuple(v.shape)) for v in values if isinstance(v, Tensor))


def tensor_name(program: Program, site: Site, mechanism: Mechanism, name: str) -> str:
    """model.layers.3.self_attn.reattend.agent.an_bias; the k-th call of a shared module has tensors of its own."""
    module, _, call = site.path.partition("#")
    if program.prefix:
        module = module.removeprefix(program.prefix).lstrip(".")
    slug = f"{mechanism.slug}_{call}" if call else mechanism.slug
    return ".".join(part for part in (module, "reattend", slug, name) if part)


def mount(root: nn.Module, path: str, tensor: Tensor) -> None:
    """Put a tensor at a dotted path below root, making plain modules on the way where there are none."""
    *parents, last = path.split(".")
    module = root
    for part in parents:
        if not isinstance(getattr(module, part, None), nn.Module):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(last, tensor)
    elif last not in module._buffers:
        module.register_buffer(last, tensor)


def _filled(name: str, declared: Param, like: Tensor) -> Tensor:
    """A tensor as its mechanism wants it to start; random starts depend on the name alone."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    with from_seed(seed, like.device), torch.no_grad():
        return declared.started(like)


def insert_before(
    node: fx.Node, fragment: fx.GraphModule, inputs: Mapping[str, fx.Node], *, like: fx.Node
) -> tuple[tuple[fx.Node, ...], set[fx.Node]]:
    """Copy a fragment's nodes in front of `node`, belonging where `like` does; its outputs, and all new nodes."""
    graph = node.graph
    mapped: dict[fx.Node, fx.Node] = {}
    made: set[fx.Node] = set()
    outputs: Any = ()
    root = graph.owning_module
    assert root is not None, "a graph without a module has nowhere to keep constants"
    with graph.inserting_before(node):
        for inner in fragment.graph.nodes:
            if inner.op == "placeholder":
                mapped[inner] = inputs[inner.name]
            elif inner.op == "output":
                outputs = inner.args[0]
            elif inner.op == "get_attr":
                constant = getattr(fragment, str(inner.target))
                mapped[inner] = graph.get_attr(_mount_constant(root, constant))
                mapped[inner].meta = dict(inner.meta)
            else:
                copy = mapped[inner] = graph.node_copy(inner, lambda n: mapped[n])
                copy.meta = dict(inner.meta) | {k: like.meta[k] for k in _PLACE if k in like.meta}
                made.add(copy)
    results = outputs if isinstance(outputs, list | tuple) else (outputs,)
    return tuple(mapped[r] for r in results), made


def _mount_constant(root: nn.Module, constant: Tensor) -> str:
    """A constant of a fragment, held by the target graph; equal ones are held once."""
    content = hashlib.sha256(repr((constant.dtype, constant.tolist())).encode()).hexdigest()[:12]
    target = f"_reattend_constants.c_{content}"
    mount(root, target, constant)
    return target


def get_attr(graph: fx.Graph, before: fx.Node, target: str, value: Tensor, fake: Callable[[Tensor], Any]) -> fx.Node:
    with graph.inserting_before(before):
        node = graph.get_attr(target)
    node.meta["val"] = fake(value)
    return node
