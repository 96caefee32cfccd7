"""Which way of decoding a mechanism's forward implies: it is traced once, and its one primitive call says it.

What was derived is compared with the forward over a whole sequence before it is used.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor, fx

from .decode_ways import KeptKeys, OwnWay, ScanState, Standing, State, Way, decodes_by_itself
from .primitives.attend_spec import AttendSpec
from .primitives.scan_meaning import scan_shapes
from .primitives.scan_spec import ScanSpec
from .problem import hidden, problem
from .reach import Reach, moves_freely, reach
from .refusal import Refused
from .site import Site
from .symbol_text import parse
from .tracing import Setting, trace

FITS = "one causal attend(..., site=site), one causal scan, or a mechanism that defines state, prefill and step"
_CHECKED = (3, 1, 1, 4, 2)  # rows at a time in which the derived form is compared with the whole
_TOLERANCE = 1e-6


def way_of(at: Standing) -> Way:
    """The mechanism's own way, or the one that its forward implies; refused by name where it implies none."""
    if decodes_by_itself(at.mechanism):
        region = at.mechanism.part == "region"
        OwnWay().empty(at, hidden(1, width=at.site.width) if region else _tensors(at.site, 1)[0])  # it may refuse
        return OwnWay()
    try:
        ports = _ports_of(at)
        way = _derived(at, ports)
        _holds(way, at, ports)
    except Refused as refused:
        raise refused.at(f"{at.site.path}: {at.mechanism.slug}: decode") from None
    return way


def _ports_of(at: Standing) -> tuple[str, ...]:
    """What a forward reads of a token beside q, k and v, where this site has it."""
    asked = sum(at.mechanism.wanted_ports(), ())
    known = tuple(port for port in ("x", "gate") if port in asked and port in at.site.ports)
    read = {n.name for n in _traced(at, 5, known).graph.find_nodes(op="placeholder") if n.users} if known else ()
    return tuple(port for port in known if port in read)


def _derived(at: Standing, ports: tuple[str, ...]) -> Way:
    if at.mechanism.draws(at.site):
        raise Refused("its forward draws random tensors", fits=FITS)
    missing = [port for port in at.mechanism.wanted_ports()[0] if port not in ("q", "k", "v", *ports)]
    if missing:
        raise Refused(f"it asks for {', '.join(missing)} of every token", fits=FITS)
    short, long = _traced(at, 5, ports), _traced(at, 9, ports)
    specs = _primitives(short)
    if len(specs) != 1:
        found = f"its forward is {len(specs)} primitive calls ({', '.join(n for n, _ in specs) or 'none'})"
        raise Refused(found, fits=FITS)
    if specs != _primitives(long):
        raise Refused("its forward depends on the length of the sequence", fits="knobs that fix the length")
    ((name, text),) = specs
    if name not in _DERIVED:
        raise Refused(f"its forward is one {name}", fits=FITS)
    return _DERIVED[name](at, short, text, ports)


def _traced(at: Standing, count: int, ports: tuple[str, ...]) -> fx.GraphModule:
    q, k, v = _tensors(at.site, count)
    spec, tables = at.moved(torch.arange(count), torch.arange(count))
    return trace(at.mechanism, Setting(at.site, spec), at.values(q, k, v, tables, _rows(at, count, ports))).graph


def _rows(at: Standing, count: int, ports: tuple[str, ...], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Numbers for ports of `count` tokens: x (B, N, C), gate (B, H, N, Dv)."""
    site = at.site
    made = {
        "x": lambda: hidden(count, width=site.width, dtype=dtype),
        "gate": lambda: problem(count, heads=site.heads, dim=site.v_dim, dtype=dtype, seed=2)[0],
    }
    return {port: made[port]() for port in ports}


def _tensors(site: Site, count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    q, k, _ = problem(count, heads=site.heads, kv_heads=site.kv_heads, dim=site.dim, dtype=dtype)
    v = problem(count, heads=site.heads, kv_heads=site.kv_heads, dim=site.v_dim, dtype=dtype, seed=1)[2]
    return q, k, v


def _calls(graph: fx.GraphModule) -> list[fx.Node]:
    return [n for n in graph.graph.nodes if n.op == "call_function" and str(n.target).startswith("reattend.")]


def _primitives(graph: fx.GraphModule) -> list[tuple[str, str]]:
    return [(str(n.target).split(".")[1], str(n.args[-1])) for n in _calls(graph)]


def _kept(at: Standing, graph: fx.GraphModule, text: str, ports: tuple[str, ...]) -> KeptKeys:
    (node,) = _calls(graph)
    spec, expected = AttendSpec.of(text), at.moved(torch.arange(1), torch.arange(1))[0]
    if (spec.q_positions, spec.k_positions) != (expected.q_positions, expected.k_positions):
        raise Refused("attend without site=site cannot know where its keys stand", fits="attend(..., site=site)")
    if any(spec.rows) or spec.tiles or spec.leader or not spec.is_causal:
        found = "gathered rows, tiles or groups" if spec.is_causal else f"predicate {spec.keep or 'everything'}"
        raise Refused(found, fits="a causal attend over all keys in order, cut by its predicate alone")
    for size in ("N", "M"):
        if size in _names(spec):
            raise Refused(f"its score depends on {size}, the length of the sequence", fits="knobs that fix the length")
    plain = replace(spec, q_positions="", k_positions="").text
    own = all(_row_by_row(n, port) for n, port in zip(node.args[1], "kv"))  # type: ignore[arg-type]
    # keys that are mixed with their neighbours before they are attended cannot be cut: their neighbours count
    bound = reach(plain) if own else Reach()
    return KeptKeys(bound, moves_freely(plain) and not at.tables, ports)


def _names(spec: AttendSpec) -> frozenset[str]:
    texts = [spec.weight, spec.sink, spec.after, *(part for segment in spec.segments for part in segment[:2])]
    return frozenset(n for text in texts if text for n in parse(text).names)


def _row_by_row(node: fx.Node, port: str) -> bool:
    """Whether a value is a port, or elementwise functions of it alone."""
    while node.op == "call_function" and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        if len(node.all_input_nodes) != 1:
            return False
        node = node.all_input_nodes[0]
    return node.op == "placeholder" and node.name == port


def _scanned(at: Standing, graph: fx.GraphModule, text: str, ports: tuple[str, ...]) -> ScanState:
    (node,) = _calls(graph)
    spec = ScanSpec.of(text)
    if not spec.causal or spec.state or spec.documents:
        raise Refused(f"a scan {text}", fits="a causal scan from an empty state, without resets")
    names = tuple(n.name for n in graph.graph.find_nodes(op="placeholder"))
    last = list(graph.graph.find_nodes(op="placeholder"))[-1]
    with graph.graph.inserting_after(last):
        start = graph.graph.placeholder("state")
    q, kv, tables, _ = node.args
    told = replace(spec, state=f"t{len(tables)}", outputs=(*spec.outputs, "state"))  # type: ignore[arg-type]
    node.args = (q, kv, [*tables, start], told.text)  # type: ignore[misc]
    output = next(iter(graph.graph.find_nodes(op="output")))
    with graph.graph.inserting_before(output):
        after = graph.graph.call_function(operator.getitem, (node, len(spec.outputs)))
    output.args = ((output.args[0][0], after),)
    graph.graph.lint()
    graph.recompile()
    (q_val, *kv_vals) = (n.meta["val"] for n in (q, *kv))  # type: ignore[misc]
    (state,) = scan_shapes([[q_val], kv_vals, []], replace(spec, outputs=("state",)).text)
    return ScanState(graph, names, tuple(int(size) for size in state.shape[1:]), ports)


_DERIVED: Mapping[str, Callable[[Standing, fx.GraphModule, str, tuple[str, ...]], Way]] = {
    "attend": _kept,
    "scan": _scanned,
}


def _holds(way: Way, at: Standing, ports: tuple[str, ...]) -> None:
    """Row by row the same as all at once, on a small problem: what the graph does around its primitive counts too."""
    count, wide = sum(_CHECKED), at.to(torch.float64)
    q, k, v = _tensors(at.site, count, torch.float64)
    named = _rows(at, count, ports, torch.float64)
    state: State = {}
    rows = []
    try:
        for start, stop in pairwise(accumulate(_CHECKED, initial=0)):
            here = {port: t.narrow(t.ndim - 2, start, stop - start) for port, t in named.items()}
            o, state = way.run(wide, state, start, *(t[:, :, start:stop] for t in (q, k, v)), **here)
            rows.append(o)
    except (RuntimeError, IndexError) as failed:
        raise Refused(f"a step fails: {str(failed).splitlines()[0]}", fits=FITS) from None
    error = float((torch.cat(rows, 2) - wide.whole(q, k, v, named)).abs().max())
    if not error <= _TOLERANCE:
        fits = "a forward whose row i depends on rows up to i alone, not on their number"
        raise Refused(f"token by token differs from the whole sequence by {error:.2g}", fits=fits)
