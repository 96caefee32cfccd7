"""A model before and after a recipe on one call: numbers first, then time, memory, and where the time goes."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .capture import capture
from .hosted import captured_for
from .hosting import about
from .peak_memory import HOW, peak_bytes
from .signature import Call, forward_signature
from .site_share import share_of_time
from .sized import amount
from .timing import RUNS, Timing, timed
from .verification import EXACT_OWN, Deviation, compare_outputs


@dataclass(frozen=True)
class Bench:
    """Every pair is (before, after); where `failed` says why, nothing else was measured."""

    model: str
    recipe: str
    machine: str
    how: str  # "eager, float32, (4, 128) (4, 128)"
    deviation: Deviation
    exact: bool  # whether every rewrite claims equal numbers
    failed: str = ""
    timing: Timing | None = None
    amount: int = 1
    unit: str = "calls"
    memory: tuple[int, int] | None = None  # peak bytes above weights and inputs
    memory_by: str = ""
    share: tuple[float, float] | None = None  # of the time, in modules that attend

    @property
    def rate(self) -> tuple[float, float] | None:
        """Tokens, images or calls a second."""
        t = self.timing
        return None if t is None else (1e3 * self.amount / t.before, 1e3 * self.amount / t.after)

    def verdict(self) -> str:
        if self.failed or self.timing is None:
            return f"NOT MEASURED: {self.failed or 'a call that changes its arguments cannot be repeated'}"
        changed = f"another model: relative deviation {self.deviation.relative:.3g}"
        kind = "equal numbers" if self.exact else changed if self.deviation.max_abs else "equal on this input"
        return f"{self.timing.verdict()}; {kind}"

    def text(self) -> str:
        lines = [self.verdict(), "", f"model      {self.model}", f"recipe     {self.recipe}",
                 f"machine    {self.machine}", f"run        {self.how}", f"deviation  {self.deviation}"]  # fmt: skip
        if self.timing is not None and self.rate is not None:
            t, rate = self.timing, self.rate
            ratio = f"{t.ratio:.2f} x, median of {t.runs} interleaved pairs ({t.spread()})"
            lines.append(f"time       {t.before:.2f} ms -> {t.after:.2f} ms, {ratio}")
            lines.append(f"rate       {rate[0]:,.0f} -> {rate[1]:,.0f} {self.unit}/s")
        if self.memory is not None:
            before, after = (f"{m / 1e6:.2f} MB" for m in self.memory)
            lines.append(f"memory     {before} -> {after} peak above weights and inputs ({self.memory_by})")
        if self.share is not None:
            lines.append(f"in sites   {self.share[0]:.0%} -> {self.share[1]:.0%} of the time of the graph, projections "
                         f"included")  # fmt: skip
        return "\n".join(lines)

    __str__ = text

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can say it."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        timing = {} if self.timing is None else {"ratio": self.timing.ratio, "interval": self.timing.interval}
        return {"verdict": self.verdict(), "rate": self.rate, **timing} | plain


def measure(
    original: nn.Module,
    fast: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    model: str,
    recipe: str,
    compiled: bool = False,
    runs: int = RUNS,
    seconds: float = 20.0,
) -> Bench:
    """Compare, then time and weigh, two models on one call."""
    before, after = (_compiled(m) if compiled else m for m in (original, fast))
    with torch.no_grad():
        expected, got = original(*args, **kwargs), after(*args, **kwargs)
    deviation, exact = compare_outputs(got, expected), _exact(fast)
    found = Bench(model, recipe, machine(), _how(original, args, kwargs, compiled), deviation, exact)
    failed = _unequal(deviation, expected) if exact else ""
    if failed:
        return replace(found, failed=failed)
    device = next((p.device.type for p in original.parameters()), "cpu")
    count, unit = amount(args, kwargs)
    return replace(
        found,
        timing=timed(before, after, args, kwargs, runs=runs, seconds=seconds),
        amount=count,
        unit=unit,
        memory=(peak_bytes(_call(before, args, kwargs), device), peak_bytes(_call(after, args, kwargs), device)),
        memory_by=HOW.get(device, "not known"),
        share=_shares(original, fast, args, kwargs),
    )


def machine() -> str:
    """What a figure was measured on, without its name."""
    kind = torch.backends.cpu.get_cpu_capability()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    cores = f"{os.cpu_count()} cores {platform.machine()} {kind}, {torch.get_num_threads()} threads"
    return f"{cores}{gpu}, torch {torch.__version__.partition('+')[0]}"


def _compiled(model: nn.Module) -> Any:
    return torch.compile(model, dynamic=False)


def _call(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return model(*args, **kwargs)

    return run


def _how(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], compiled: bool) -> str:
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    dtype = "" if weight is None else f"{str(weight.dtype).removeprefix('torch.')}, "
    shapes = " ".join(str(tuple(v.shape)) for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
    return f"{'torch.compile' if compiled else 'eager'}, {dtype}{shapes}"


def _exact(fast: nn.Module) -> bool:
    """Whether the rewrites that stand all claim equal numbers; a whole-model pass claims none."""
    report = getattr(fast, "report", None)
    if report is None:
        return True
    return not report.passes and all(row.kind in ("", "exact") for row in report.rows if row.status == "rewritten")


def _unequal(deviation: Deviation, expected: Any) -> str:
    """Why an exact rewrite's output is not the original's; bounds as at the sites, times the depth they add up over."""
    tensors = [t for t in torch.utils._pytree.tree_leaves(expected) if isinstance(t, Tensor) and t.is_floating_point()]
    if not tensors:
        return ""
    largest = max(float(tensors[0].abs().max()), 1.0) if tensors[0].numel() else 1.0
    bound = DEPTH * EXACT_OWN.get(tensors[0].dtype, 1e-4) * largest
    if deviation.max_abs <= bound:
        return ""
    return f"claimed to be exact, and the output is off by {deviation.max_abs:.3g} (allowed: {bound:.3g})"


DEPTH = 4  # rounding of one site is carried through the layers behind it


def _shares(
    original: nn.Module, fast: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[float, float] | None:
    """Node by node in the captured and in the rewritten graph; none where the model was captured in islands."""
    if about(fast) is None:
        return None
    call = Call.of(forward_signature(original), args, kwargs)
    now, before = captured_for(fast, args, kwargs), capture(original, args, kwargs)
    sites = [row.site.path for row in about(fast).sites]
    shares = [share_of_time(c, c.inputs(call), sites) for c in (before, now)]
    return shares[0], shares[1]
