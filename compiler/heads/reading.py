"""A raised model ready to be read: its sites, and for each call the tensors that every site's attention reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..capture import Captured, capture
from ..pipeline import raise_program
from ..primitives.attend_spec import AttendSpec
from ..program import Program, Store
from ..refusal import Refused
from ..signature import Call, forward_signature
from ..site import Site
from ..symbol_eval import evaluate
from ..symbols import Expr
from ..taps import stream_groups

Edit = Callable[[Tensor, Sequence[Any]], Tensor]  # o and the attention's own arguments (q, (k, v), tables, text)


@dataclass(frozen=True)
class Seen:
    """One site as one call meets it."""

    site: Site
    spec: AttendSpec
    q: Tensor  # (B, H, N, D)
    k: Tensor  # (B, Hkv, M, D)
    v: Tensor
    tables: tuple[Tensor, ...] = ()
    padding: Expr | None = None  # over (b, j): which keys are real

    @property
    def offset(self) -> int:
        """The position of the first query."""
        return self.k.shape[2] - self.q.shape[2] if self.spec.align == "end" else 0

    def real(self) -> Tensor:
        """Which queries are no padding (B, N); all of them where the site compares two sequences."""
        batch, _, n, _ = self.q.shape
        if self.padding is None or not self.site.self_attention:
            return torch.ones(batch, n, dtype=torch.bool, device=self.q.device)
        device = self.q.device
        names = {
            "b": torch.arange(batch, device=device).view(-1, 1, 1, 1),
            "j": (torch.arange(n, device=device) + self.offset).view(1, 1, 1, -1),
        }
        kept = evaluate(self.padding, names, {f"t{k}": t for k, t in enumerate(self.tables)})
        return (kept if kept.dtype == torch.bool else kept != 0).expand(batch, 1, 1, n)[:, 0, 0]


@dataclass(frozen=True)
class Reading:
    """A model's graph with every attention as one node; the model's weights, shared."""

    captured: Captured
    program: Program
    model: nn.Module

    @staticmethod
    def of(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Reading:
        captured = capture(model, args, kwargs)
        program, misses = raise_program(captured, Store())
        if not program.sites:
            nearest = "; ".join(misses) or "nothing in it multiplies a softmax of a product with values"
            raise Refused("no attention found", where=type(model).__name__, fits=nearest)
        return Reading(captured, program, model)

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.program.sites

    def call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Call, tuple[Tensor, ...]]:
        """A call of the kind that was captured, and its tensors."""
        call = Call.of(forward_signature(self.model), args, kwargs)
        if call.layouts != self.captured.layouts:
            given, first = (", ".join(n for n, _ in c.layouts) or "nothing" for c in (call, self.captured))
            raise Refused(f"a call with {given}", where="heads", fits=f"one like the first, with {first}")
        tensors = self.captured.inputs(call)
        self.captured.check(tensors)
        return call, tensors

    def each(self, tensors: Sequence[Tensor], receive: Callable[[Seen], None]) -> None:
        """Every site in order, handed over as soon as its tensors exist and forgotten afterwards."""

        def collected(path: str, values: dict[str, Tensor]) -> None:
            receive(self._seen(path, values))

        stream_groups(self.program.graph, tensors, {s.path: self._wanted(s.path) for s in self.sites}, collected)

    def edited(self, call: Call, tensors: Sequence[Tensor], edits: Mapping[str, Edit]) -> Any:
        """The model's output with the attention output of some sites replaced."""
        nodes = {self.program.ports[path].attend: edit for path, edit in edits.items()}
        return self.captured.result(call, _Edited(self.program.graph, nodes).run(*tensors))

    def met(self, path: str, arguments: Sequence[Any]) -> Seen:
        """A site from the arguments of its attention."""
        q, (k, v), tables, _ = arguments
        return self._seen(path, {"q": q, "k": k, "v": v} | {f"table_{n}": t for n, t in enumerate(tables)})

    def _wanted(self, path: str) -> dict[str, fx.Node]:
        attend: Any = self.program.ports[path].attend
        q, (k, v), tables, _ = attend.args
        return {"q": q, "k": k, "v": v} | {f"table_{n}": node for n, node in enumerate(tables)}

    def _seen(self, path: str, values: Mapping[str, Tensor]) -> Seen:
        ports = self.program.ports[path]
        tables = tuple(values[f"table_{n}"] for n in range(len(values) - 3))
        spec = AttendSpec.of(str(ports.attend.args[3]))
        return Seen(self.program.site(path), spec, values["q"], values["k"], values["v"], tables, ports.padding)


class _Edited(fx.Interpreter):
    """Runs a graph with the first output of some attentions replaced by what an edit makes of it."""

    def __init__(self, graph: fx.GraphModule, edits: Mapping[fx.Node, Edit]) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self.edits = edits

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n not in self.edits:
            return value
        arguments, _ = self.fetch_args_kwargs_from_env(n)
        return [self.edits[n](value[0], arguments), *value[1:]]
