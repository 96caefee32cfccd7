"""Whether the captured and raised graph, which every rewrite is measured against, gives what the model itself gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .capture import Captured
from .containers import MUTABLE, copied, take_apart
from .nodes import draws
from .padding import KEPT
from .signature import Call
from .untouched import unchanged
from .verification import EXACT_OWN, Deviation, compare


def against_model(model: nn.Module, captured: Captured, call: Call) -> Deviation | None:
    """How far apart they are on the call; None where that cannot be told: dropout, buffers written, no real weights,
    sizes out of the graph's range, and draws that change the answer. A model that seeds them itself gives one answer,
    which a graph without the seed misses.
    """
    held = [*model.parameters(), *model.buffers()]
    if model.training or captured.writes or any(t.is_meta or hasattr(t, "fake_mode") for t in held):
        return None
    if captured.grown and not captured.fits(call):
        return None
    chancy = any(map(draws, captured.graph.graph.nodes))
    with torch.no_grad(), torch.random.fork_rng(devices=[], enabled=chancy):
        grad = KEPT in captured.key.setting  # which the graph is of
        wanted = _answer(model, call, grad)
        if chancy and not all(map(_same, wanted, _answer(model, call, grad))):
            return None
        found = captured.graph(*captured.inputs(call))[: captured.output.count]
    if len(wanted) != len(found):
        return None
    pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if isinstance(b, Tensor) and b.is_floating_point()]
    return max((_compared(a, b) for a, b in pairs), key=lambda d: d.max_abs, default=None)


def too_far(deviation: Deviation, model: nn.Module) -> str:
    """What to warn of, or ""; float32 sums in another order differ in their last places."""
    kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    limit = EXACT_OWN.get(kind, EXACT_OWN[torch.float32])
    if deviation.relative <= limit or deviation.max_abs <= limit:
        return ""
    return f"the captured graph is not the model: its output is off by {deviation}, before any rewrite"


def _answer(model: nn.Module, call: Call, grad: bool) -> list[Any]:
    again = Call.of(call.signature, *copied((call.args, dict(call.kwargs))))  # caches grow
    known = {id(again.values[name]): name for name, layout in again.layouts if layout.kind in MUTABLE}
    with torch.set_grad_enabled(grad), unchanged(model):
        answer = model(*again.args, **dict(again.kwargs))
    return [leaf.tensor for leaf in take_apart(answer, "", known)[0]]


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)


def _compared(found: Any, wanted: Tensor) -> Deviation:
    """Where the model gives no number (a row without a key, filled with minus infinity) there is nothing to compare."""
    return compare(torch.where(wanted.isnan(), wanted, found), wanted)
