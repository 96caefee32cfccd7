"""What every mechanism must answer: limits, lengths, no look ahead, gradients, heads, types, text, refusals, export."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, replace
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from .case import DIM, HEADS, Case, cases
from .mechanism import Mechanism, mechanism, mechanisms
from .place import run
from .refusal import Refused

CLOSE = 1e-6


@dataclass(frozen=True)
class Failure(Exception):
    """The smallest problem on which a question is answered wrongly."""

    says: str

    def __str__(self) -> str:
        return self.says


@dataclass(frozen=True)
class Question:
    """`ask` counts the problems asked about, and raises Failure at the first wrong answer."""

    name: str
    says: str
    ask: Callable[[Mechanism], int]


def limits_hold(m: Mechanism) -> int:
    count = 0
    for count, limit in enumerate(m.limits(), 1):  # noqa: B007 - the count is the answer
        got, expected = limit.got(), limit.expected()
        _expect(_distance(got, expected.expand_as(got)) <= limit.atol, f"limit {limit.says!r}", got, expected)
    return count


def lengths(m: Mechanism) -> int:
    """1, 7 and 33 tokens, cross lengths, grouped heads, grids: an output of the right shape without a NaN."""
    count = 0
    for case in cases(m):
        tensors = case.tensors()
        like = tensors["x"] if case.alone else tensors.get("o", tensors["q"])
        answer = case.answer(tensors)
        if answer.shape != like.shape:
            raise Failure(f"{case}: shape {tuple(answer.shape)}, not {tuple(like.shape)}")
        if not torch.isfinite(answer).all():
            raise Failure(f"{case}: not finite")
        count += 1
    return count


def never_looks_ahead(m: Mechanism) -> int:
    """On causal sites, changing all tensors from token t on leaves the rows before t as they are."""
    count = 0
    for case in cases(
        m, only=lambda case: case.pattern.startswith("causal") and (case.n < 10 or case.kv_heads == HEADS)
    ):
        tensors, own = case.tensors(), case.own()
        answer = case.answer(tensors, own)
        for t in range(1, case.n, 1 if case.n < 10 else 16):
            changed = {port: _from(tensor, case.leading(port), t) for port, tensor in tensors.items()}
            other = case.answer(changed, own)
            axis = 1 if case.alone else 2
            early, late = answer.narrow(axis, 0, t), other.narrow(axis, 0, t)
            if _distance(early, late) > CLOSE:
                row = int((early - late).abs().movedim(axis, 0).flatten(1).amax(1).gt(CLOSE).nonzero()[0])
                raise Failure(f"{case}: row {row} changes with tokens from {t} on, by {_distance(early, late):.1e}")
            count += 1
    return count


def gradients(m: Mechanism) -> int:
    """In float64 the gradients of all tensors are those of finite differences, and one reaches every learned tensor."""
    count = 0
    for small in cases(m, sizes=(3, 8), only=lambda case: case.kv_heads == HEADS or case.n == 3):
        case = replace(small, dtype=torch.float64, batch=1)
        given = {**case.tensors(), **{f"p.{name}": tensor for name, tensor in case.own().items()}}
        names = [name for name, tensor in given.items() if tensor.is_floating_point()]
        fixed = {name: tensor for name, tensor in given.items() if name not in names}

        def answer(*values: Tensor, case: Case = case, names: Any = names, fixed: Any = fixed) -> Tensor:
            both = {**fixed, **dict(zip(names, values, strict=True))}
            own = {name[2:]: tensor for name, tensor in both.items() if name.startswith("p.")}
            return case.answer({name: t for name, t in both.items() if not name.startswith("p.")}, own)

        values = [given[name].clone().requires_grad_() for name in names]
        try:
            torch.autograd.gradcheck(answer, values, fast_mode=True)
        except (GradcheckError, RuntimeError) as error:
            raise Failure(f"{case}: {_first_lines(error)}") from None
        learned = [(name, value) for name, value in zip(names, values, strict=True) if name.startswith("p.")]
        found = torch.autograd.grad(
            answer(*values).square().sum(), [value for _, value in learned], allow_unused=True
        ) if learned else ()  # fmt: skip
        idle = [name for (name, _), g in zip(learned, found, strict=True) if case.n > 3 and (g is None or not g.any())]
        if idle:
            raise Failure(f"{case}: no gradient reaches {', '.join(idle)}")
        count += 1
    return count


def heads_commute(m: Mechanism) -> int:
    """Heads in another order, per-head tensors with them, give the same heads in that order."""
    if not m.heads_alike or m.part in ("region", "insert"):
        return 0
    order = torch.arange(HEADS).roll(2)
    count = 0
    for case in cases(m, sizes=(7,), only=lambda case: case.kv_heads == HEADS):
        tensors, own = case.tensors(), case.own()
        moved = {port: t if port.startswith("x") else t[:, order] for port, t in tensors.items()}
        expected = case.answer(tensors, own)[:, order]
        got = case.answer(moved, {name: _by_head(t, order) for name, t in own.items()})
        _expect(_distance(got, expected) <= 1e-5, f"{case}: heads in order {order.tolist()}", got, expected)
        count += 1
    return count


def batches_apart(m: Mechanism) -> int:
    """A sample's answer does not depend on the other samples of its batch."""
    count = 0
    for case in cases(m, sizes=(7,), only=lambda case: case.kv_heads == HEADS):
        tensors, own = case.tensors(), case.own()
        both, alone = case.answer(tensors, own), case.answer({port: t[:1] for port, t in tensors.items()}, own)
        _expect(_distance(both[:1], alone) <= 1e-5, f"{case}: the first sample alone", alone, both[:1])
        count += 1
    return count


def deterministic(m: Mechanism) -> int:
    count = 0
    for case in cases(m, sizes=(7,), only=lambda case: case.kv_heads == HEADS):
        first, second = case.answer(), case.answer()
        _expect(torch.equal(first, second), f"{case}: asked twice", second, first)
        count += 1
    return count


def half_precision(m: Mechanism) -> int:
    """float16 and bfloat16 stay in their type, finite and near what the same numbers give in float64."""
    count = 0
    for wide in cases(m, sizes=(7, 33), only=lambda case: case.kv_heads == HEADS):
        for dtype in (torch.float16, torch.bfloat16):
            case = replace(wide, dtype=dtype)
            tensors, own = case.tensors(), case.own()
            got = case.answer(tensors, own)
            exact = replace(wide, dtype=torch.float64).answer(_double(tensors), _double(own))
            if got.dtype != dtype:
                raise Failure(f"{case}: {got.dtype} out of {dtype}")
            near = 8 * torch.finfo(dtype).eps * (1 + float(exact.abs().max()))
            _expect(_distance(got, exact) <= near, f"{case} in {dtype}", got, exact)
            count += 1
    return count


def honoured(m: Mechanism) -> int:
    """A key hidden by a padding mask, a mask or a bias of -1e4 may hold anything (features that it says it honours)."""
    count = 0
    for case in cases(m, sizes=(7,)):
        tensors, own = case.tensors(), case.own()
        for feature, given in _hiding_last_key(case).items():
            place = case.place(tensors, **given) if feature in m.honours else None
            if place is None or m.refuses(place.site):
                continue
            changed = {
                p: _from(t, case.leading(p), case.m - 1) if p in "kv" or case.alone else t for p, t in tensors.items()
            }
            expected, got = case.answer(tensors, own, **given), case.answer(changed, own, **given)
            if case.alone:  # the hidden token's own row may be anything
                expected, got = expected[:, :-1], got[:, :-1]
            _expect(_distance(got, expected) <= 1e-5, f"{case}: last key hidden by {feature}", got, expected)
            count += 1
    return count


def written_as_text(m: Mechanism) -> int:
    """Its knobs survive YAML: what a recipe says is what stands in the model."""
    if mechanisms().get(m.slug) is not type(m):
        raise Failure(f"{m!r}: not registered under {m.slug!r}")
    knobs = {name: getattr(m, name) for name in m.knobs()}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in knobs.items()}
    try:
        read = mechanism(m.slug, **yaml.safe_load(yaml.safe_dump(plain)))
    except (yaml.YAMLError, Refused) as error:
        raise Failure(f"{m!r}: {_first_lines(error)}") from None
    if read != m or hash(read) != hash(m):
        raise Failure(f"{m!r}: comes back from YAML as {read!r}")
    undefined = [name for name, (_, default) in m.knobs().items() if default is MISSING]
    if undefined:
        raise Failure(f"{m!r}: no default for {', '.join(undefined)}")
    return len(knobs) + 1


def refuses_by_name(m: Mechanism) -> int:
    """A missing port, a feature that it does not honour and an unknown params name are refused, naming them."""
    case = next(cases(m), None)
    if case is None:
        return 0
    place = case.place(case.tensors())
    for port in m.wanted_ports()[0]:
        without = replace(place.site, ports=tuple(p for p in place.site.ports if p != port))
        _named(m.refuses(without), port, f"{case} without port {port}")
    if m.part in ("core", "region"):
        for feature in sorted({"bias", "softcap", "sinks", "padding", "mask"} - set(m.honours)):
            having = replace(place.site, features=frozenset({feature}))
            _named(m.refuses(having), feature, f"{case} with {feature}")
    with contextlib.suppress(Refused):
        run(m, place, {"no_such_tensor": torch.zeros(1)})
        raise Failure(f"{case}: takes params named no_such_tensor")
    return 1


def exported(m: Mechanism) -> int:
    """torch.export takes it, with a dynamic number of tokens where there is no grid, and the graph gives the same."""
    count = 0
    for case in _one_per_pattern(m):
        tensors = case.tensors()
        layer = _Exportable(case, tuple(tensors))
        dynamic = None
        if case.grid is None:
            dynamic = (tuple({case.leading(p): torch.export.Dim.AUTO} for p in tensors),)
        try:
            with torch.no_grad():
                graph = torch.export.export(layer, tuple(tensors.values()), dynamic_shapes=dynamic, strict=False)
        except Exception as error:  # whatever export raises is the answer
            raise Failure(f"{case}: torch.export: {_first_lines(error)}") from None
        other = replace(case, n=case.n + 4, m=case.m + 4) if case.grid is None else case
        try:
            got = graph.module()(*other.tensors().values())
        except (AssertionError, RuntimeError) as error:
            raise Failure(f"{other}: exported at N={case.n}: {_first_lines(error)}") from None
        expected = other.answer(other.tensors(), case.own())
        _expect(_distance(got, expected) <= 1e-5, f"{other}: exported at N={case.n}", got, expected)
        count += 1
    return count


QUESTIONS = tuple(
    Question(name, says, ask)
    for name, says, ask in (
        ("limits", "its exact cases hold", limits_hold),
        ("lengths", "any length, cross, grouped heads, grids", lengths),
        ("causal", "causal never looks ahead", never_looks_ahead),
        ("gradients", "gradients are those of finite differences", gradients),
        ("heads", "permuting heads commutes", heads_commute),
        ("batch", "samples do not mix", batches_apart),
        ("deterministic", "twice the same", deterministic),
        ("half", "float16 and bfloat16 run", half_precision),
        ("honours", "hidden keys do not matter", honoured),
        ("text", "knobs survive YAML", written_as_text),
        ("refusals", "refuses by name", refuses_by_name),
        ("export", "torch.export with dynamic tokens", exported),
    )
)


class _Exportable(nn.Module):
    """A case's mechanism as a module of its ports, its own tensors as parameters."""

    def __init__(self, case: Case, ports: tuple[str, ...]) -> None:
        super().__init__()
        self.case, self.ports = case, ports
        self.own = nn.ParameterDict({k: nn.Parameter(t, t.is_floating_point()) for k, t in case.own().items()})

    def forward(self, *tensors: Tensor) -> Tensor:
        place = self.case.place(dict(zip(self.ports, tensors, strict=True)))
        return run(self.case.mechanism, place, dict(self.own.items()))[0]


def _one_per_pattern(m: Mechanism) -> Iterator[Case]:
    seen: set[Any] = set()
    for case in cases(m, sizes=(7, 8), only=lambda case: case.kv_heads == HEADS):
        kind = (case.pattern, case.grid is None)
        if kind not in seen:
            seen.add(kind)
            yield case


def _hiding_last_key(case: Case) -> dict[str, dict[str, Tensor]]:
    seen = torch.ones(case.batch, case.m, dtype=torch.bool)
    seen[:, -1] = False
    if case.alone:
        return {"padding": {"mask": seen}}
    bias = torch.zeros(1, HEADS, case.n, case.m)
    bias[..., -1] = -1e4
    whole = seen[:, None, None, :].expand(case.batch, 1, case.n, case.m)
    return {"padding": {"mask": seen}, "mask": {"mask": whole}, "bias": {"bias": bias}}


def _from(tensor: Tensor, axis: int, start: int) -> Tensor:
    """The tensor with other numbers from one token on."""
    changed = tensor.clone()
    later = changed.narrow(axis, start, tensor.shape[axis] - start)
    later.copy_(3.0 - 2.0 * later)
    return changed


def _by_head(tensor: Tensor, order: Tensor) -> Tensor:
    """A learned tensor's heads in another order: its axis of H, or of H * D channels."""
    for axis, size in enumerate(tensor.shape):
        if size == HEADS:
            return tensor.index_select(axis, order)
        if size == HEADS * DIM:
            return tensor.unflatten(axis, (HEADS, DIM)).index_select(axis, order).flatten(axis, axis + 1)
    return tensor


def _double(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


def _expect(holds: bool, where: str, got: Tensor, expected: Tensor) -> None:
    if not holds:
        raise Failure(f"{where}: off by {_distance(got, expected.expand_as(got)):.1e}")


def _named(reason: str | None, name: str, where: str) -> None:
    if reason is None or name not in reason:
        raise Failure(f"{where}: refusal {reason!r} does not name {name}")


def _first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:300]}"
