"""Putting a mechanism where a site stands: its traced fragment replaces the node, its tensors join the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from .algebra.projections import projections
from .facts import features
from .inserting import OnStream, on_stream, stream_at
from .mechanism import Mechanism
from .memory import room_for
from .nodes import args_of
from .ports import real_keys
from .primitives.attend_spec import AttendSpec, keep_text
from .program import Change, Program, get_attr, insert_before, mount, tensor_name
from .refusal import Refused
from .site import Site
from .surgery import insert
from .symbols import TRUE, Expr
from .tracing import Fragment, Setting, trace


def put(program: Program, path: str, mechanism: Mechanism, *, dropped: frozenset[str] = frozenset()) -> Change:
    """Rewrite one site by a core, gate or region mechanism, or put an inserted one beside it."""
    site, ports = program.site(path), program.ports[path]
    if mechanism.part == "insert":
        mechanism = OnStream(mechanism, program.training)
    anchor = _anchor(program, path, mechanism)
    if mechanism.part == "insert":
        site = on_stream(site, anchor.meta["val"])
    reason = mechanism.refuses(site, dropped)
    if reason:
        raise Refused(reason, where=str(site))
    setting = _setting(site, ports.attend, dropped)
    before = _behind(anchor) if mechanism.part in ("gate", "insert") else anchor  # these read the value they replace
    with room_for(mechanism, path):
        inputs = _inputs(program, site, mechanism, ports.attend, anchor, before)
    fragment = _fragment(program, mechanism, setting, inputs)
    if mechanism.part == "cache":
        return _stored(program, mechanism, setting, fragment, dropped)
    change = _change(program, site, mechanism, setting, fragment, inputs, dropped)
    output = _spliced(program, change, inputs, anchor, before)
    program.changes.append(change)
    if mechanism.part in ("core", "gate"):
        ports.nodes["o"] = output
    elif mechanism.part == "region":
        ports.projected = output
    return change


def _setting(site: Site, attend: fx.Node, dropped: frozenset[str]) -> Setting:
    """The site and its attention as the mechanism shall see them."""
    window = None if "window" in dropped else site.window
    facts = replace(site, features=site.features - dropped, window=window)
    return Setting(facts, without(AttendSpec.of(str(attend.args[3])), dropped))


def _change(
    program: Program,
    site: Site,
    mechanism: Mechanism,
    setting: Setting,
    fragment: Fragment,
    inputs: Mapping[str, fx.Node],
    dropped: frozenset[str],
) -> Change:
    """What is written down of it."""
    stood = str(program.ports[site.path].attend.args[3])
    targets = {n: str(inputs[n].target) for n in fragment.inputs if n.startswith("param_")}
    own = {n: program.store.get(target) for n, target in targets.items()}
    return Change(site, mechanism, setting, fragment, stood, own, tuple(targets.values()), tuple(sorted(dropped)))


def _spliced(
    program: Program, change: Change, inputs: Mapping[str, fx.Node], anchor: fx.Node, before: fx.Node
) -> fx.Node:
    """The fragment stands in the graph in the anchor's place, its losses and buffers among the program's outputs."""
    site, mechanism, fragment = change.site, change.mechanism, change.fragment
    anchor.meta |= {"site": site.path, "mechanism": mechanism.slug}
    results, made = insert_before(before, fragment.graph, {n: inputs[n] for n in fragment.inputs}, like=anchor)
    output, *beside = results
    _same_shape(site.path, mechanism, anchor.meta["val"], output.meta["val"])
    anchor.replace_all_uses_with(output, delete_user_cb=lambda user: user not in made)
    for name, node in zip(fragment.losses, beside, strict=False):
        program.losses.append((f"{site.path}.{name}", node))
    for name, node in zip(fragment.buffers, beside[len(fragment.losses) :], strict=True):
        program.buffers.append((tensor_name(program, site, mechanism, name), node))
    return output


def _behind(anchor: fx.Node) -> fx.Node:
    """Where something stands that reads a node: right behind it, arguments of the graph before all else."""
    node = anchor.next
    while node.op == "placeholder":
        node = node.next
    return node


def _stored(program: Program, mechanism: Any, setting: Setting, fragment: Fragment, dropped: frozenset[str]) -> Change:
    """k and v, wherever the site's attention or what is put in its place reads them, as they come back from storage."""
    path = setting.site.path
    ports = program.ports[path]
    attend, made = ports.attend, dict[fx.Node, fx.Node]()
    for port in ("k", "v"):
        rows = ports.nodes[port]
        if rows not in made:
            (made[rows],) = insert(attend, mechanism.store, {"rows": rows}, like=attend)
            made[rows].meta |= {"site": path, "mechanism": mechanism.slug}
        ports.nodes[port] = made[rows]
    attend.args = (args_of(attend)[0], [made.get(n, n) for n in args_of(attend)[1]], *args_of(attend)[2:])
    change = Change(
        program.site(path), mechanism, setting, fragment, str(attend.args[3]), dropped=tuple(sorted(dropped))
    )
    program.changes.append(change)
    return change


def without(spec: AttendSpec, dropped: frozenset[str]) -> AttendSpec:
    """The site's attention with features left out that the recipe permits to drop."""
    if not dropped:
        return spec
    keep = TRUE
    for condition in spec.conjuncts:
        own = features(AttendSpec(score="s", keep=condition.text))
        if not own & dropped:
            keep = keep & condition
    scale = spec.scale if spec.scale is not None else 1.0
    plain = {"bias", "softcap"} & dropped
    return replace(
        spec,
        keep=keep_text(keep),
        score=f"s * {scale!r}" if plain else spec.score,
        sink="" if "sinks" in dropped else spec.sink,
        after="" if "dropout" in dropped else spec.after,
        empty="",
    )


def _anchor(program: Program, path: str, mechanism: Mechanism) -> fx.Node:
    """The node whose value the mechanism replaces."""
    ports = program.ports[path]
    if mechanism.part in ("core", "gate", "cache"):
        return ports.nodes["o"]
    if mechanism.part == "region":
        if ports.projected is None:
            raise Refused(
                "the output projection was not found", where=path, fits="a site whose o feeds one linear layer"
            )
        return ports.projected
    if isinstance(mechanism, OnStream):
        return stream_at(program, path, mechanism)
    raise Refused(f"part {mechanism.part!r}", where=path, fits="core, gate, cache, region, insert")


def _inputs(
    program: Program, site: Site, mechanism: Mechanism, attend: fx.Node, anchor: fx.Node, before: fx.Node
) -> dict[str, fx.Node]:
    """The fragment's inputs: the ports it asks for, the site's tables, its own tensors."""
    ports = program.ports[site.path].nodes | ({"x": anchor} if mechanism.part == "insert" else {})
    must, may = mechanism.wanted_ports()
    inputs = {n: ports[n] for n in (*must, *may) if n in ports and n != "key_padding"}
    padding = program.ports[site.path].padding
    if padding is not None and "key_padding" in (*must, *may):
        inputs["key_padding"] = _key_padding(padding, ports, attend, before)
    if program.graph.training and "train" in may:
        inputs["train"] = insert(before, lambda q: q.new_ones(()), {"q": ports["q"]}, like=before)[0]
    tables = () if mechanism.part == "insert" else attend.args[2]  # of the scores, which it does not see
    inputs |= {f"table_{k}": node for k, node in enumerate(tables)}  # type: ignore[arg-type]
    like = anchor.meta["val"]
    fake = program.fake_mode.from_tensor
    params = {tensor_name(program, site, mechanism, name): name for name in mechanism.params(site)}
    starts = {} if params.keys() <= program.store.parameters.keys() else _starts(program, site, mechanism)
    for target, name in params.items():
        declared = mechanism.params(site)[name]
        value: Tensor = program.store.parameter(target, declared, like, starts.get(name))
        inputs[f"param_{name}"] = _own_tensor(program, before, target, value, fake)
    for name, declared in mechanism.buffers(site).items():
        target = tensor_name(program, site, mechanism, name)
        inputs[f"param_{name}"] = _own_tensor(
            program, before, target, program.store.buffer(target, declared, like), fake
        )
    return inputs


def _starts(program: Program, site: Site, mechanism: Mechanism) -> Mapping[str, Tensor]:
    """What starts from the site's own projections: nothing where a mechanism does not ask, or they are not known."""
    if type(mechanism).starts_from is Mechanism.starts_from:
        return {}
    weights = projections(program, site)
    with torch.no_grad():
        return mechanism.starts_from(site, weights) if weights else {}


def _key_padding(padding: Expr, ports: dict[str, fx.Node], attend: fx.Node, before: fx.Node) -> fx.Node:
    tables = {f"t{k}": node for k, node in enumerate(args_of(attend)[2])}

    def compute(q: Tensor, k: Tensor, **tables: Tensor) -> Tensor:
        return real_keys(padding, q, k, tables)

    (found,) = insert(before, compute, {"q": ports["q"], "k": ports["k"], **tables}, like=attend)
    return found


def _own_tensor(program: Program, before: fx.Node, target: str, value: Tensor, fake: Any) -> fx.Node:
    mount(program.graph, target, value)
    return get_attr(program.graph.graph, before, target, value, fake)


def _fragment(program: Program, mechanism: Mechanism, setting: Setting, inputs: dict[str, fx.Node]) -> Fragment:
    """Traced once per distinct site signature."""
    values = {name: node.meta["val"] for name, node in inputs.items()}
    shapes = tuple((n, str(tuple(v.shape)), str(v.dtype), str(v.stride())) for n, v in values.items())
    key = (repr(mechanism), setting.signature, shapes)
    if key not in program.fragments:
        program.fragments[key] = trace(mechanism, setting, values)
    found: Fragment = program.fragments[key]
    return found


def _same_shape(path: str, mechanism: Mechanism, old: Tensor, new: Tensor) -> None:
    if str(tuple(old.shape)) != str(tuple(new.shape)):
        found = f"{mechanism.slug} gives {tuple(new.shape)}"
        raise Refused(found, where=path, fits=f"the shape that stands here, {tuple(old.shape)}")
