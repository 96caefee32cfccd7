"""What passes through a group on its way to the weights that read it: the values to look at, and the readers' size."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx

from ...compiler.algebra.groups import Group
from ...compiler.program import Program
from ...compiler.refusal import Refused


def inputs_of(program: Program, group: Group) -> fx.Node:
    """The value that a group's first reader multiplies with."""
    name = group.reads[0].weight
    for node in program.graph.graph.find_nodes(op="get_attr", target=name):
        for user in node.users:
            given = [a for a in user.args if isinstance(a, fx.Node) and a.op != "get_attr"]
            if given:
                return given[0]
    raise Refused(f"nothing multiplies with {name}", where=group.where)


def largest_weights(group: Group, state: Mapping[str, Tensor]) -> Tensor:
    """(blocks, size): the largest magnitude with which each channel is read."""
    most = [slot.take(state[slot.weight].detach().double()).flatten(1).abs().amax(1) for slot in group.reads]
    parts = [m.reshape(group.blocks, -1, group.size).amax(1) for m in most]
    found = parts[0]
    for part in parts[1:]:
        found = found.maximum(part)
    return found
