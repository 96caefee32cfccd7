"""How much of a call's time is spent in the modules that attend, their projections included."""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .capture import Captured

RUNS = 5


def share_of_time(captured: Captured, tensors: Sequence[Tensor], sites: Collection[str]) -> float:
    """The median over some runs of a graph, node by node; calls into Python between the nodes are not counted."""
    modules = {path.partition("#")[0] for path in sites}
    shares = []
    with torch.no_grad():
        for run in range(RUNS + 1):
            clock = _Clock(captured.graph, modules)
            clock.run(*tensors)
            if run and clock.whole:
                shares.append(clock.inside / clock.whole)
    return statistics.median(shares) if shares else 0.0


class _Clock(fx.Interpreter):
    """Runs a graph and keeps the time of its nodes, those apart that stand in a module that attends."""

    def __init__(self, graph: fx.GraphModule, modules: Collection[str]) -> None:
        super().__init__(graph)
        self.inside = self.whole = 0.0
        self.attending = {n for n in graph.graph.nodes if _inside(n, modules)}

    def run_node(self, n: fx.Node) -> Any:
        start = time.perf_counter()
        value = super().run_node(n)
        took = time.perf_counter() - start
        if n.op in ("call_function", "call_module"):
            self.whole += took
            self.inside += took * (n in self.attending)
        return value


def _inside(node: fx.Node, modules: Collection[str]) -> bool:
    """Whether a node belongs to one of these modules or stands at a site."""
    stack = node.meta.get("nn_module_stack") or {}
    return "site" in node.meta or any(path in modules for path, _ in stack.values())
