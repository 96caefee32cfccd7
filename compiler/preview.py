"""What a recipe would change on a machine one does not have: FLOPs, bytes, memory and time from shapes alone.

The model has no weights in memory; it is captured, raised and rewritten as always, and nothing is run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .attempts import AS_GIVEN
from .capture import capture
from .cost import Cost, graph_cost, human, node_cost
from .devices import Device
from .draft import drafting
from .kv_bytes import cache_bytes
from .live_bytes import peak_live_bytes
from .pipeline import raise_program, rewrite
from .program import Change, Store
from .recipe import Recipe
from .refusal import Refused
from .steps import steps_of


@dataclass(frozen=True)
class Side:
    """One model on one call: all predicted."""

    cost: Cost
    weights: int  # bytes
    peak: int  # bytes of values held at once, beside weights
    kv: int  # bytes of caches after the call
    seconds: float  # roofline, operator by operator

    @property
    def memory(self) -> int:
        return self.weights + self.peak + self.kv


@dataclass(frozen=True)
class Preview:
    model: str
    recipe: str
    device: Device
    batch: int
    tokens: int
    dtype: str
    before: Side
    after: Side
    rewritten: int
    sites: int
    refused: tuple[str, ...] = ()

    def verdict(self) -> str:
        a, b = self.before, self.after
        parts = [f"predicted, not measured: {self.rewritten} of {self.sites} sites rewritten",
                 f"roofline {a.seconds / b.seconds:.2f} x as fast on {self.device.name}"]  # fmt: skip
        if a.kv:
            parts.append(f"KV cache {b.kv / a.kv:.2f} x")
        if b.memory > self.device.memory:
            parts.append(f"DOES NOT FIT {human(self.device.memory)}B of one {self.device.name}")
        return "; ".join(parts)

    def text(self) -> str:
        rows = [
            ("FLOPs", *(human(s.cost.flops) for s in self._sides)),
            ("bytes moved", *(f"{human(s.cost.bytes)}B" for s in self._sides)),
            ("weights", *(f"{human(s.weights)}B" for s in self._sides)),
            ("peak of values", *(f"{human(s.peak)}B" for s in self._sides)),
            ("KV cache", *(f"{human(s.kv)}B" for s in self._sides)),
            ("memory in all", *(f"{human(s.memory)}B" for s in self._sides)),
            ("time, roofline", *(_time(s.seconds) for s in self._sides)),
        ]
        head = [self.verdict(), "", f"model    {self.model}, {self.dtype}", f"recipe   {self.recipe}",
                f"call     batch {self.batch}, {self.tokens} tokens, one pass over all of them",
                f"device   {self.device.name}: {self.device.source}", ""]  # fmt: skip
        table = [f"{name:<16}{before:>12}{after:>12}" for name, before, after in (("", "before", "after"), *rows)]
        return "\n".join([*head, *table, *(f"refused: {r}" for r in self.refused)])

    __str__ = text

    @property
    def _sides(self) -> tuple[Side, Side]:
        return self.before, self.after

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self) | {"device": self.device.name}, default=str))
        return {"verdict": self.verdict()} | plain


def foresee(
    model: nn.Module, recipe: Recipe, args: Sequence[Any], kwargs: Mapping[str, Any], *, device: Device, name: str
) -> Preview:
    """Both sides of a recipe on one call of a model whose weights may be on the meta device."""
    with drafting():
        token = AS_GIVEN.set(True)  # a batch of 1 stays one; lengths stay open: long masks are compared at short ones
        try:
            captured = capture(model, args, kwargs)
        finally:
            AS_GIVEN.reset(token)
        raised, _ = raise_program(captured, Store())
        if not raised.sites:
            raise Refused("no attention found", where=name, fits="a model that attends")
        steps, _ = steps_of(recipe, raised.sites)
        outcome = rewrite(raised, steps)
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    batch, tokens = int(tensors[0].shape[0]), _tokens(tensors[0])
    changes: dict[str, list[Change]] = {}
    for change in outcome.program.changes:
        changes.setdefault(change.site.path, []).append(change)
    weights = sum(t.numel() * t.element_size() for t in _distinct(model))
    added = sum(t.numel() * t.element_size() for c in outcome.program.changes for t in c.own.values())

    def side(graph: fx.GraphModule, own: Mapping[str, Sequence[Change]], held: int) -> Side:
        kept = cache_bytes(raised.sites, own, batch=batch, tokens=tokens, dtype=dtype)
        return Side(graph_cost(graph), held, peak_live_bytes(graph), kept, _seconds(graph, device, dtype))

    return Preview(
        name, recipe.source or recipe.digest[:8], device, batch, tokens, str(dtype).removeprefix("torch."),
        side(raised.graph, {}, weights), side(outcome.program.graph, changes, weights + added),
        len(changes), len(raised.sites), tuple(f"{s.path}: {why}" for s, why in outcome.refused),
    )  # fmt: skip


def _seconds(graph: fx.GraphModule, device: Device, dtype: torch.dtype) -> float:
    """Operators one after the other, each at its own roof."""
    total = 0.0
    for node in graph.graph.nodes:
        cost = node_cost(node)
        total += device.seconds(cost.flops, cost.bytes, dtype)
    return total


def _tokens(tensor: Tensor) -> int:
    return int(tensor.shape[1]) if tensor.ndim in (2, 3) else 1


def _distinct(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, tied ones once."""
    return [*model.parameters(), *model.buffers()]


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
