"""Taps: named quantities streamed out of a running graph, one at a time, so that nothing is kept that nobody asked for.

Verification, calibration, recovery and head analysis all read a model through this one door.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

Receive = Callable[[str, Tensor], None]


def stream(graph: fx.GraphModule, inputs: Sequence[Any], taps: Mapping[str, fx.Node], receive: Receive) -> Any:
    """Run a graph and hand each tapped value over as soon as it exists; the graph's own output is returned."""
    wanted: dict[fx.Node, list[str]] = defaultdict(list)
    for name, node in taps.items():
        wanted[node].append(name)
    return _Streaming(graph, wanted, receive).run(*inputs)


class _Streaming(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, wanted: Mapping[fx.Node, list[str]], receive: Receive) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self.wanted, self.receive = wanted, receive

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for name in self.wanted.get(n, ()):
            self.receive(name, value)
        return value


def stream_groups(
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    groups: Mapping[str, Mapping[str, fx.Node]],
    receive: Callable[[str, dict[str, Tensor]], None],
) -> Any:
    """As `stream`, with several values handed over together: a site's ports once the last of them exists."""
    held: dict[str, dict[str, Tensor]] = defaultdict(dict)

    def collect(name: str, value: Tensor) -> None:
        group, _, port = name.rpartition("\0")
        held[group][port] = value.detach() if isinstance(value, Tensor) else value  # or a size
        if len(held[group]) == len(groups[group]):
            receive(group, held.pop(group))

    taps = {f"{group}\0{port}": node for group, ports in groups.items() for port, node in ports.items()}
    with torch.no_grad():
        return stream(graph, inputs, taps, collect)
