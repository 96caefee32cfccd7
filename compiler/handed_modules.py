"""A graph that is handed the modules it calls, found by one walk a call: step by step, from `self` to each layer, they
cost as much as short products.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

from torch import fx, nn


class Handed:
    """Where the modules at some paths are found in a model, whoever stands there by now."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths
        self.steps: list[tuple[int, str]] = []  # from which of the modules found so far, to which of its children
        places = {"": 0}
        for path in paths:
            above = ""
            for name in path.split("."):
                here = f"{above}.{name}" if above else name
                if here not in places:
                    self.steps.append((places[above], name))
                    places[here] = len(self.steps)
                above = here
        self.ends = [places[path] for path in paths]

    def of(self, model: nn.Module) -> list[nn.Module]:
        """
        >>> model = nn.Sequential(nn.Sequential(nn.ReLU(), nn.Tanh()), nn.GELU())
        >>> Handed(["0.1", "1", "0"]).of(model) == [model[0][1], model[1], model[0]]
        True
        """
        found = [model]
        try:
            for above, name in self.steps:
                found.append(found[above]._modules[name])  # type: ignore[arg-type]
        except KeyError:  # something in between was wrapped and hands attributes on
            return [operator.attrgetter(path)(model) for path in self.paths]
        return [found[place] for place in self.ends]


def hand_modules(graph: fx.Graph, is_module: Callable[[str], bool]) -> Handed:
    """Every module that a graph reads or calls becomes an input of it, in front of all others."""
    placed: dict[str, fx.Node] = {}
    first = next(iter(graph.nodes))

    def handed(path: str) -> fx.Node:
        if path not in placed:
            with graph.inserting_before(first):
                placed[path] = graph.placeholder(f"module_{len(placed)}")
        return placed[path]

    for node in list(graph.nodes):
        path = str(node.target)
        if node.op == "call_module":
            with graph.inserting_before(node):
                called = graph.call_function(operator.call, (handed(path), *node.args), node.kwargs)
        elif node.op == "get_attr" and is_module(path):
            called = handed(path)
        else:
            continue
        node.replace_all_uses_with(called)
        graph.erase_node(node)
    return Handed(tuple(placed))
