"""Attention transfer: each rewritten site alone learns to give what the original's site gives on the same inputs.

The teacher runs once; as soon as a site's values exist, the site's new pieces run on them, and the gradient is taken at
once, so that one site at a time is held (LoLCATs, arXiv 2410.10254). Where projections learn too, the site begins at
the hidden state in front of them: x ── W_q, W_k, W_v ── mechanism ── o.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..held_out import Batch
from ..nodes import args_of
from ..pipeline import Outcome
from ..program import Change
from ..taps import stream_groups
from ..verification import at_the_site, in_turn, padding_port
from .losses import relative
from .pair import OnModel, Pair, View

_EXPECTED = "expected"


@dataclass(frozen=True)
class SiteTransfer:
    """One site: what is tapped from the teacher, and what the student computes from it."""

    path: str
    changes: tuple[Change, ...]
    taps: Mapping[str, fx.Node]  # the expected output, the ports and boundary values that are read
    behind: fx.GraphModule | None  # boundary values to ports, by weights that learn
    boundary: tuple[str, ...] = ()
    ports: tuple[str, ...] = ()

    def run(self, student: nn.Module, values: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The site's relative square error, and the losses that its mechanisms name."""
        seen = dict(values)
        expected = seen.pop(_EXPECTED)
        if self.behind is not None:
            found = OnModel(student, self.behind).run(*(seen[name] for name in self.boundary))
            seen |= dict(zip(self.ports, found, strict=True))
        seen |= padding_port(self.changes[0], seen)
        own = [
            {n: _attribute(student, target) for n, target in zip(change.own, change.tensors, strict=True)}
            for change in self.changes
        ]
        got, losses = in_turn(self.changes, seen, own)
        return relative(got, expected), losses


def transfers(outcome: Outcome, learns: frozenset[str]) -> tuple[SiteTransfer, ...]:
    """Every site that computes something else than before, in the graph's order."""
    by_path: dict[str, list[Change]] = {}
    for change in outcome.program.changes:
        by_path.setdefault(change.site.path, []).append(change)
    by_path = {path: at_the_site(changes) for path, changes in by_path.items()}
    changed = {p: c for p, c in by_path.items() if any(one.mechanism.kind != "exact" for one in c)}
    return tuple(_transfer(outcome, path, changes, learns) for path, changes in changed.items())


def _transfer(outcome: Outcome, path: str, changes: list[Change], learns: frozenset[str]) -> SiteTransfer:
    reference = outcome.reference
    ports = reference.ports[path]
    region = changes[-1].mechanism.part == "region"
    asked = {name for change in changes for name in change.fragment.inputs}
    if changes[0].mechanism.part in ("core", "cache"):
        asked -= {"o"}  # a gate reads what the core before it gives
    wanted = {name: ports.nodes[name] for name in sorted(asked) if name in ports.nodes}
    wanted |= {f"table_{k}": node for k, node in enumerate(args_of(ports.attend)[2])}
    expected: Any = ports.projected if region else ports.nodes["o"]
    stops = {ports.nodes[n] for n in ("x", "x_kv") if n in ports.nodes}
    behind, boundary, inside = _behind(reference.graph, wanted, stops, learns)
    taps = {name: node for name, node in wanted.items() if name not in inside}
    taps |= {f"in_{k}": node for k, node in enumerate(boundary)} | {_EXPECTED: expected}
    names = tuple(f"in_{k}" for k in range(len(boundary)))
    return SiteTransfer(path, tuple(changes), taps, behind, names, tuple(inside))


def _behind(
    graph: fx.GraphModule, wanted: Mapping[str, fx.Node], stops: set[fx.Node], learns: frozenset[str]
) -> tuple[fx.GraphModule | None, list[fx.Node], list[str]]:
    """The piece of graph from the hidden state to the ports that learning weights reach; the rest is tapped."""
    moving: set[fx.Node] = set()
    for node in graph.graph.nodes:
        own = node.op == "get_attr" and str(node.target) in learns
        if node not in stops and (own or any(source in moving for source in node.all_input_nodes)):
            moving.add(node)
    inside = {name: node for name, node in wanted.items() if node in moving}
    if not inside:
        return None, [], []
    needed: set[fx.Node] = set()
    waiting = list(inside.values())
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += [source for source in node.all_input_nodes if node in moving]
    piece = fx.Graph()
    boundary = [n for n in graph.graph.nodes if n in needed and n not in moving]
    placed = {node: piece.placeholder(f"in_{k}") for k, node in enumerate(boundary)}
    for node in graph.graph.nodes:
        if node in needed and node in moving:
            placed[node] = piece.node_copy(node, lambda n: placed[n])
    piece.output(tuple(placed[node] for node in inside.values()))
    return fx.GraphModule(graph, piece), boundary, list(inside)


def _attribute(model: nn.Module, target: str) -> Any:
    found: Any = model
    for part in target.split("."):
        found = getattr(found, part)
    return found


def stream_transfer(
    pair: Pair, view: View, sites: tuple[SiteTransfer, ...], call: Batch, receive: Callable[[str, Tensor], None],
    *, grad: bool,
) -> None:  # fmt: skip
    """Run the teacher on a call; hand over each site's loss as soon as it can be computed."""
    by_path = {site.path: site for site in sites}
    _, tensors = view.inputs(call, pair.teacher)

    def judge(path: str, values: dict[str, Tensor]) -> None:
        with torch.set_grad_enabled(grad):
            error, losses = by_path[path].run(pair.student, values)
            receive(path, sum(losses, error) if grad else error)

    stream_groups(view.outcome.reference.graph, tensors, {site.path: site.taps for site in sites}, judge)
