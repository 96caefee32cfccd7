"""Teacher and student: the original on its own weights, and the rewritten model; memory is shared until written.

Both are seen in two ways: as modules that are called, and as graphs of one call whose sites and ports can be tapped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn

from ..capture import Captured, capture
from ..draft import drafting
from ..giving_way import ours
from ..held_out import Batch
from ..hosted import host
from ..hosting import about, is_hosted, original
from ..lowering import lower_calls
from ..pipeline import Outcome, lower, raise_program
from ..plain_graph import CONSTANTS
from ..program import Store
from ..refusal import Refused
from ..rewriting import Rewriting
from ..signature import Call, SignatureKey, forward_signature

Receive = Any


class Pair:
    """`student` is hosted and rewritten; `teacher` hosted, masks folded into the attention that torch has."""

    def __init__(self, student: Any, source: nn.Module, work: Rewriting) -> None:
        self.student, self.work = student, work
        self.views: dict[SignatureKey, View] = {}
        self.teacher: Any = host(source, self._folded).eval().requires_grad_(False)

    def view(self, call: Batch) -> View:
        """The graphs of a call's signature, made at its first call."""
        plain = original(self.teacher)
        return self._view(plain, Call.of(forward_signature(plain), *call))

    def _view(self, model: nn.Module, call: Call) -> View:
        view = self.views.get(call.key())
        if view is None or not view.captured.fits(call):
            view = self.views[call.key()] = View(*self.work.replay(model, call))
        return view

    def _folded(self, model: nn.Module, call: Call) -> Captured:
        view = self._view(model, call)
        with drafting():
            graph = view.outcome.reference.copy().graph
            lower_calls(graph)
        return replace(view.captured, graph=graph)


@dataclass
class View:
    """One signature's graphs: `outcome.reference` is the teacher's, `outcome.program` the student's."""

    captured: Captured  # of the teacher, before any rewrite
    outcome: Outcome

    def inputs(self, call: Batch, model: nn.Module) -> tuple[Call, tuple[Tensor, ...]]:
        asked = Call.of(forward_signature(original(model)), *call)
        return asked, self.captured.inputs(asked)

    def run_student(self, student: nn.Module, call: Batch, taps: Mapping[str, fx.Node], receive: Any) -> Any:
        """The student's output and named losses, its own values handed over on the way, with gradients."""
        asked, tensors = self.inputs(call, student)
        program = self.outcome.program
        flat = OnModel(student, program.graph, taps=taps, receive=receive).run(*tensors)
        lowered = lower(program, self.captured)
        return lowered.result(asked, flat), lowered.extras(flat)[0]


class OnModel(fx.Interpreter):
    """Runs a graph on the tensors of another model by name; constants are the graph's own."""

    def __init__(
        self,
        model: nn.Module,
        graph: fx.GraphModule,
        *,
        taps: Mapping[str, fx.Node] = {},
        receive: Receive = None,
    ) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self.model, self.receive = model, receive
        self.wanted: dict[fx.Node, list[str]] = {}
        for name, node in taps.items():
            self.wanted.setdefault(node, []).append(name)

    def fetch_attr(self, target: str) -> Any:
        if target.startswith(f"{CONSTANTS}."):
            return super().fetch_attr(target)
        found: Any = self.model
        for part in target.split("."):
            found = getattr(found, part)
        return found

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for name in self.wanted.get(n, ()):
            self.receive(name, value)
        return value


def pair_of(fast: Any, teacher: nn.Module | None, calls: Sequence[Batch]) -> Pair:
    """The rewritten model and the model it is to be like: by default its own weights under the original's attention."""
    if not is_hosted(fast) or about(fast) is None:
        fits = "what optimize() gave, captured whole; DistillTrainer trains any other model"
        raise Refused(f"a {type(fast).__name__} that holds no graph", where="recover", fits=fits)
    work: Rewriting = about(fast)
    if teacher is None and work.trained:
        fits = "teacher=the original model"
        raise Refused(f"its weights were trained already ({work.trained})", where="recover", fits=fits)
    source = original(fast if teacher is None else teacher)
    if type(source) is not type(original(fast)):
        found = f"a teacher that is a {type(source).__name__}"
        raise Refused(found, where="recover", fits=f"a {type(original(fast)).__name__}, as the student")
    for args, kwargs in calls[:1]:
        ours(fast, "prepare")(*args, **kwargs)  # decides, where no call has come yet
    return Pair(fast, source, work)


def folded(model: nn.Module, call: Call) -> Captured:
    """A model's own graph, masks folded into the attention that torch has."""
    with drafting():
        captured = capture(model, call.args, dict(call.kwargs))
        raise_program(captured, Store())
        lower_calls(captured.graph)
        return captured
