"""The stage `weights`: exact rewrites of a model's own weights, checked at its output before anything is written."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from ..calibration import Reducer, calibrate
from ..mechanism import Mechanism
from ..pipeline import Step
from ..program import Program
from ..refusal import Refused
from ..verification import EXACT_OWN, Deviation, compare_outputs
from .groups import Group, find_groups
from .moves import Absorb, Move

Batch = Sequence[Any]


class WeightPass(Mechanism):
    """A whole-model pass that only moves weights within the symmetry groups of the model: exact."""

    part: ClassVar[str] = "model"
    kind: ClassVar[str] = "exact"
    stage: ClassVar[str] = "weights"

    def move(self, weights: Weights) -> None:
        """Find groups, take statistics, apply moves; what cannot be done is refused, and then nothing is."""
        raise Refused(f"{type(self).__name__} does not say how", fits="define it")


@dataclass
class Weights:
    """A program's weights while they are moved: its groups, its own copies of what has changed, calls to learn from."""

    program: Program
    batches: Sequence[Batch]
    groups: tuple[Group, ...] = ()
    state: dict[str, Tensor] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    fitted: bool = False  # to what the calls showed

    @staticmethod
    def of(raised: Program, batches: Sequence[Batch]) -> Weights:
        program = raised.copy()
        names = {str(n.target) for n in program.graph.graph.find_nodes(op="get_attr")}
        state = {name: operator.attrgetter(name)(program.graph) for name in sorted(names)}
        return Weights(program, batches, find_groups(raised), state)

    def of_kind(self, kind: str, action: str) -> tuple[Group, ...]:
        """The groups of a kind that allow an action; refused where there is none, with the reason of the first."""
        known = [g for g in self.groups if g.kind == kind]
        found = tuple(g for g in known if action in g.allows)
        if not found:
            for one in known:
                one.check(action)
            raise Refused(
                f"no {kind} group", fits=f"the graph shows {', '.join(sorted({g.kind for g in self.groups})) or 'none'}"
            )
        return found

    def apply(self, move: Move | Absorb) -> None:
        new = move.forward(self.state)
        for name, tensor in new.items():
            _put(self.program.graph, name, tensor)
        self.state |= new
        self.changed |= new

    def calibrate(self, wanted: Mapping[str, tuple[fx.Node, Reducer]]) -> dict[str, Tensor]:
        self.fitted = True
        return calibrate(self.program.graph, self.batches, wanted)

    def say(self, line: str) -> None:
        self.said.append(line)

    def back_to(self, state: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> None:
        for name, tensor in state.items():
            if tensor is not self.state[name]:
                _put(self.program.graph, name, tensor)
        self.state, self.changed = dict(state), dict(changed)


@dataclass(frozen=True)
class Moved:
    """What the stage did: a line a pass, and the passes that were refused."""

    lines: tuple[str, ...] = ()
    refused: tuple[tuple[Step, Refused], ...] = ()
    fitted: bool = False


def move_weights(
    model: nn.Module, raised: Program, steps: Sequence[Step], batches: Callable[[], Sequence[Batch]]
) -> Moved:
    """Take the weight passes among the steps, in order, on the model itself; each holds its output or is undone."""
    wanted = [(step, step.mechanism) for step in steps if isinstance(step.mechanism, WeightPass)]
    if not wanted:
        return Moved()
    weights = Weights.of(raised, batches())
    lines, refused = list[str](), list[tuple[Step, Refused]]()
    for step, chosen in wanted:
        state, changed, said = dict(weights.state), dict(weights.changed), len(weights.said)
        try:
            chosen.move(weights)
            deviation = _checked(raised, weights)
        except Refused as no:
            weights.back_to(state, changed)
            refused.append((step, no.at(chosen.slug)))
            continue
        told = "; ".join(weights.said[said:])
        lines.append(f"{chosen!r}: {told}; output off by {deviation.relative:.2g}")
    with torch.no_grad():
        for name, tensor in weights.changed.items():
            operator.attrgetter(name)(model).data = tensor
    return Moved(tuple(lines), tuple(refused), weights.fitted)


def _checked(raised: Program, weights: Weights) -> Deviation:
    """How far the output is from the original's; a rewrite that is not exact here is refused."""
    worst = max((_apart(raised.graph, weights.program.graph, b) for b in weights.batches[:1]), key=lambda d: d.relative)
    held = [t.dtype for t in weights.changed.values() if t.dtype in EXACT_OWN]
    limit = max((EXACT_OWN[dtype] for dtype in held), default=EXACT_OWN[torch.float32])
    if not worst.relative <= limit:
        raise Refused(
            f"its output is off by {worst.relative:.2g}", fits=f"at most {limit:g}: float32 weights, or other calls"
        )
    return worst


def _apart(one: fx.GraphModule, other: fx.GraphModule, batch: Batch) -> Deviation:
    outputs = []
    for graph in (one, other):
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # dropout draws the same
            outputs.append(graph(*batch))
    return compare_outputs(outputs[1], outputs[0])


def _put(graph: fx.GraphModule, name: str, tensor: Tensor) -> None:
    path, _, last = name.rpartition(".")
    holder = graph.get_submodule(path)
    if last in holder._parameters:
        holder._parameters[last] = nn.Parameter(tensor, requires_grad=False)
    else:
        holder._buffers[last] = tensor
