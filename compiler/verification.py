"""What each rewrite changed: per site on the values that really arrive there, and at the model's output.

An `exact` rewrite must match in float64 and in the model's own dtype; every other gets a measured deviation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .inserting import OnStream, stream_at
from .mechanism import KINDS
from .memory import room_for
from .nodes import args_of
from .ports import is_padding, real_keys
from .primitives.attend_blocks import attend_in_blocks
from .primitives.attend_spec import AttendSpec
from .program import Change, Program
from .refusal import Refused
from .taps import stream_groups
from .tracing import forward

EXACT_FLOAT64 = 1e-9  # relative to the largest output: float64 through other orders of summation
EXACT_OWN = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # a few last places


@dataclass(frozen=True)
class Deviation:
    """How far `got` is from `expected`."""

    max_abs: float
    relative: float  # ||got - expected|| / ||expected||
    cosine: float
    top1: float | None = None  # agreement of the largest entry of the last axis, where it is wide enough to be a choice
    kl: float | None = None  # KL(expected || got) of softmax over the last axis, mean

    def __str__(self) -> str:
        tail = "" if self.top1 is None else f" top-1 {self.top1:.4f} KL {self.kl:.3g}"
        return f"max {self.max_abs:.3g} relative {self.relative:.3g} cosine {self.cosine:.6f}{tail}"


CHOICE_WIDTH = 16  # from here on the last axis of a 2-D or 3-D output is read as logits


def compare(got: Tensor, expected: Tensor) -> Deviation:
    a, b = got.detach().double(), expected.detach().double()
    if a.shape != b.shape:
        raise Refused(f"shapes {tuple(a.shape)} and {tuple(b.shape)}", where="compare")
    if a.numel() == 0:
        return Deviation(0.0, 0.0, 1.0)
    difference = torch.nan_to_num(a - b, nan=math.inf, posinf=math.inf, neginf=math.inf)
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, torch.zeros_like(difference), difference)
    size, gap = b.norm().item(), difference.norm().item()
    product = a.norm().item() * size
    cosine = (a * b).sum().item() / product if product > 0 else 1.0
    choice: dict[str, float] = {}
    if a.ndim in (2, 3) and a.shape[-1] >= CHOICE_WIDTH:
        p, q = b.log_softmax(-1), a.log_softmax(-1)
        choice["top1"] = (a.argmax(-1) == b.argmax(-1)).double().mean().item()
        choice["kl"] = (p.exp() * (p - q)).sum(-1).mean().item()
    return Deviation(difference.abs().max().item(), gap / size if size > 0 else gap, cosine, **choice)


def compare_outputs(got: Any, expected: Any) -> Deviation:
    """Two whole outputs: the first floating tensor is what a model is about (logits, last hidden state)."""
    tensors = [t for t in pytree.tree_leaves(got) if isinstance(t, Tensor)]
    others = [t for t in pytree.tree_leaves(expected) if isinstance(t, Tensor)]
    if len(tensors) != len(others):
        raise Refused(f"{len(tensors)} tensors come out instead of {len(others)}", where="output")
    for a, b in zip(tensors, others):
        if b.is_floating_point() and b.ndim > 0:
            return compare(a, b)
    return compare(tensors[0], others[0]) if tensors else Deviation(0.0, 0.0, 1.0)


@dataclass(frozen=True)
class SiteResult:
    path: str
    mechanism: str
    kind: str
    deviation: Deviation
    exact_error: float | None = None  # float64, relative to the largest output; exact rewrites only
    failed: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_sites(reference: Program, changes: Sequence[Change], inputs: Sequence[Tensor]) -> list[SiteResult]:
    """Run the unchanged graph once; at each changed site feed the new piece with what the old one saw."""
    by_path: dict[str, list[Change]] = {}
    for change in changes:
        by_path.setdefault(change.site.path, []).append(change)
    by_path = {path: at_the_site(found) or found for path, found in by_path.items()}
    groups = {path: _wanted(reference, own) for path, own in by_path.items()}
    results: dict[str, SiteResult] = {}

    def judge(path: str, values: dict[str, Tensor]) -> None:
        with room_for(by_path[path][-1].mechanism, path):
            results[path] = _judge(by_path[path], values)

    if groups:
        stream_groups(reference.graph, inputs, groups, judge)
    return [results[path] for path in by_path if path in results]


def at_the_site(changes: Sequence[Change]) -> list[Change]:
    """What stands in the site's place; a mechanism that is inserted beside it is judged where it is alone."""
    return [change for change in changes if change.mechanism.part != "insert"]


def _wanted(reference: Program, changes: Sequence[Change]) -> dict[str, Any]:
    ports = reference.ports[changes[0].site.path]
    if isinstance(changes[0].mechanism, OnStream):
        stream = stream_at(reference, changes[0].site.path, changes[0].mechanism)
        return {"x": stream, "expected": stream}
    asked = {name for change in changes for name in change.fragment.inputs} | {"q", "k", "v"}
    nodes = {name: ports.nodes[name] for name in asked if name in ports.nodes}
    tables = {f"table_{k}": node for k, node in enumerate(args_of(ports.attend)[2])}
    region = changes[-1].mechanism.part == "region"
    return {**nodes, **tables, "expected": ports.projected if region else ports.nodes["o"]}


def _judge(changes: Sequence[Change], values: dict[str, Tensor]) -> SiteResult:
    """One site: its changes in turn, a gate reading what the core before it gave."""
    expected = values.pop("expected")
    values |= padding_port(changes[0], values)
    with torch.no_grad():
        got, _ = in_turn(changes, values, [change.own for change in changes])
    deviation = compare(got, expected)
    kinds = [change.mechanism.kind for change in changes]
    exact_error, failed = None, ""
    if set(kinds) == {"exact"} and len(changes) == 1 and changes[0].mechanism.part == "core":
        exact_error = _float64_error(changes[0], values | dict(changes[0].own))
        failed = _not_exact(exact_error, deviation, expected)
    if not math.isfinite(deviation.max_abs):
        failed = "values that are not finite come out where the original's are"
    names = " + ".join(change.mechanism.slug for change in changes)
    kind = next(k for k in KINDS[::-1] if k in kinds)
    return SiteResult(changes[0].site.path, names, kind, deviation, exact_error, failed)


def in_turn(
    changes: Sequence[Change], values: Mapping[str, Tensor], own: Sequence[Mapping[str, Tensor]]
) -> tuple[Tensor, list[Tensor]]:
    """What a site's changes give one after another on named values and their own tensors; the losses that they name."""
    seen, losses = {"train": torch.ones(()), **values}, list[Tensor]()  # asked for by what was traced in train() alone
    for change, tensors in zip(changes, own, strict=True):
        given = seen | dict(tensors)
        answer = change.fragment.graph(*(given[name] for name in change.fragment.inputs))
        got, *named = answer if isinstance(answer, tuple | list) else (answer,)
        losses += named[: len(change.fragment.losses)]
        seen["o"] = got
        if change.mechanism.part == "cache":
            rows: Any = change.mechanism
            seen |= {name: rows.store(seen[name]) for name in ("k", "v")}
    return seen["o"], losses


def padding_port(change: Change, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The port key_padding: what a site taps is only the table that it is read from."""
    found = next((c for c in AttendSpec.of(change.before).conjuncts if is_padding(c)), None)
    if found is None:
        return {}
    tables = {name.replace("table_", "t"): t for name, t in values.items() if name.startswith("table_")}
    return {"key_padding": real_keys(found, values["q"], values["k"], tables)}


def _not_exact(error: float, deviation: Deviation, expected: Tensor) -> str:
    largest = expected.detach().abs().max().item() if expected.numel() else 0.0
    if error > EXACT_FLOAT64:
        return f"exact in name only: float64 error {error:.3g} of the largest output"
    if deviation.max_abs > EXACT_OWN.get(expected.dtype, 1e-4) * max(largest, 1.0):
        return f"exact in float64, off by {deviation.max_abs:.3g} in {expected.dtype}"
    return ""


def _float64_error(change: Change, values: Mapping[str, Tensor]) -> float:
    wide = {n: t.double() if t.is_floating_point() else t for n, t in values.items()}
    tables = [wide[f"table_{k}"] for k in range(sum(n.startswith("table_") for n in wide))]
    with torch.no_grad():
        got, _ = forward(change.mechanism, change.setting, {n: wide[n] for n in change.fragment.inputs})
        (expected,) = attend_in_blocks([[wide["q"]], [wide["k"], wide["v"]], tables], change.before)
    largest = expected.abs().max().item() if expected.numel() else 0.0
    return compare(got, expected).max_abs / max(largest, 1e-30)


def worst_of(batches: Sequence[Sequence[SiteResult]]) -> list[SiteResult]:
    """Per site the batch with the largest deviation, or the one that failed."""
    by_path: dict[str, list[SiteResult]] = {}
    for results in batches:
        for result in results:
            by_path.setdefault(result.path, []).append(result)
    return [max(found, key=lambda r: (bool(r.failed), r.deviation.relative)) for found in by_path.values()]


def mean_of(deviations: Sequence[Deviation]) -> Deviation:
    """Over batches: the largest error, the mean of everything else."""
    if len(deviations) == 1:
        return deviations[0]

    def mean(name: str) -> float | None:
        values = [v for d in deviations if (v := getattr(d, name)) is not None]
        return sum(values) / len(values) if values else None

    relative, cosine = mean("relative"), mean("cosine")
    return Deviation(max(d.max_abs for d in deviations), relative or 0.0, cosine or 0.0, mean("top1"), mean("kl"))


def worst_first(results: Iterable[SiteResult]) -> list[SiteResult]:
    return sorted(results, key=lambda r: -r.deviation.relative)
