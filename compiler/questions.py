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

from .case import Case, cases
from .decode import Decoder
from .from_seed import from_seed
from .mechanism import Mechanism, mechanism, mechanisms
from .place import run
from .refusal import Refused
from .smallest import Beside, Failure, first_lines, of_each

CLOSE = 1e-6


@dataclass(frozen=True)
class Question:
    """`ask` counts the problems asked about, and raises Failure at the first wrong answer."""

    name: str
    says: str
    ask: Callable[[Mechanism], int]


def _small(m: Mechanism, *sizes: int) -> Iterator[Case]:
    """A case of every pattern and grid, each head with its own keys; 8 tokens where no grid with a prefix fits."""
    for some in (sizes or (7,), (8,)):
        found = list(cases(m, sizes=some, only=lambda case: not case.grouped))
        if found:
            return iter(found)
    return iter(())


def limits_hold(m: Mechanism) -> int:
    count = 0
    for count, limit in enumerate(m.limits(), 1):  # noqa: B007 - the count is the answer
        got, expected = limit.got(), limit.expected()
        _expect(_distance(got, expected.expand_as(got)) <= limit.atol, f"limit {limit.says!r}", got, expected)
    return count


@of_each(cases)
def lengths(case: Case) -> int:
    """1, 7 and 33 tokens, cross lengths, grouped heads, grids: an output of the right shape and type without a NaN."""
    tensors = case.tensors()
    like = tensors["x"] if case.alone else tensors.get("o", tensors["q"])
    answer = case.answer(tensors)
    if answer.shape != like.shape:
        raise Failure(f"{case}: shape {tuple(answer.shape)}, not {tuple(like.shape)}")
    if answer.dtype != like.dtype:
        raise Failure(f"{case}: {answer.dtype} out of {like.dtype}")
    if not torch.isfinite(answer).all():
        raise Failure(f"{case}: not finite")
    return 1


@of_each(lambda m: cases(m, only=lambda case: case.pattern.startswith("causal") and (case.n < 10 or not case.grouped)))
def never_looks_ahead(case: Case) -> int:
    """On causal sites, changing all tensors from token t on leaves the rows before t as they are."""
    tensors, own = case.tensors(), case.own()
    answer, axis = case.answer(tensors, own), 1 if case.alone else 2

    def late(t: int, ports: Iterator[str] | tuple[str, ...]) -> tuple[Tensor, Tensor]:
        changed = {port: _from(tensors[port], case.leading(port), t) for port in ports}
        other = case.answer({**tensors, **changed}, own)
        return answer.narrow(axis, 0, t), other.narrow(axis, 0, t)

    for t in range(1, case.n, 1 if case.n < 10 else 16):
        early, other = late(t, tuple(tensors))
        if _distance(early, other) > CLOSE:
            row = int((early - other).abs().movedim(axis, 0).flatten(1).amax(1).gt(CLOSE).nonzero()[0])
            guilty = [port for port in tensors if _distance(*late(t, (port,))) > CLOSE]
            found = f"row {row} changes with {', '.join(guilty) or 'the tensors'} from token {t} on"
            raise Failure(f"{case}: {found}, by {_distance(early, other):.1e}")
    return max(case.n - 1, 1)


@of_each(lambda m: cases(m, sizes=(3, 8), only=lambda case: not case.grouped or case.n == 3))
def gradients(small: Case) -> int:
    """In float64 the gradients of all tensors are those of finite differences, and one reaches every learned tensor."""
    case = replace(small, dtype=torch.float64, batch=1)
    given = {**case.tensors(), **{f"p.{name}": tensor for name, tensor in _double(case.own()).items()}}
    state = {f"p.{name}" for name in case.mechanism.buffers(case.place(case.tensors()).site)}  # nothing learns it
    names = [name for name, tensor in given.items() if tensor.is_floating_point() and name not in state]
    fixed = {name: tensor for name, tensor in given.items() if name not in names}

    def answer(*values: Tensor) -> Tensor:
        both = {**fixed, **dict(zip(names, values, strict=True))}
        own = {name[2:]: tensor for name, tensor in both.items() if name.startswith("p.")}
        return case.answer({name: t for name, t in both.items() if not name.startswith("p.")}, own)

    values = [given[name].clone().requires_grad_() for name in names]
    wrong = _wrong_gradient(answer, names, values)
    if wrong:
        raise Failure(f"{case}: {wrong}")
    try:
        torch.autograd.gradcheck(answer, values, fast_mode=True)
    except (GradcheckError, RuntimeError) as error:
        raise Failure(f"{case}: {first_lines(error)}") from None
    learned = [(name, value) for name, value in zip(names, values, strict=True) if name.startswith("p.")]
    found = torch.autograd.grad(
        answer(*values).square().sum(), [value for _, value in learned], allow_unused=True
    ) if learned else ()  # fmt: skip
    idle = [name for (name, _), g in zip(learned, found, strict=True) if case.n > 3 and (g is None or not g.any())]
    if idle and not case.mechanism.taught:
        raise Failure(f"{case}: no gradient reaches {', '.join(idle)}")
    return 1


def _wrong_gradient(answer: Callable[..., Tensor], names: list[str], values: list[Tensor]) -> str:
    """The tensor whose gradient is furthest from central differences along one direction."""
    draw = torch.Generator().manual_seed(5)
    output = answer(*values)
    weights = torch.randn(output.shape, generator=draw, dtype=output.dtype)
    found = torch.autograd.grad((output * weights).sum(), values, allow_unused=True)
    worst, says = 1e-4, ""
    for index, (name, value, gradient) in enumerate(zip(names, values, found, strict=True)):
        way = torch.randn(value.shape, generator=draw, dtype=value.dtype)
        ends = [
            float((answer(*values[:index], (value + step * way).detach(), *values[index + 1 :]) * weights).sum())
            for step in (1e-6, -1e-6)
        ]
        slope, given = (ends[0] - ends[1]) / 2e-6, 0.0 if gradient is None else float((gradient * way).sum())
        if abs(slope - given) > worst * (1 + abs(slope)):
            worst = abs(slope - given) / (1 + abs(slope))
            says = f"the gradient of {name} is {given:.3g} along a direction in which it is {slope:.3g}"
    return says


@of_each(_small)
def heads_commute(case: Case) -> int:
    """Heads in another order, per-head tensors with them, give the same heads in that order."""
    m = case.mechanism
    own = case.own()
    if not m.heads_alike or case.alone or (own and case.heads in (1, case.dim)):  # whose axis is it, then?
        return 0
    order = torch.arange(case.heads).roll(max(1, case.heads // 3))
    tensors = case.tensors()
    moved = {port: t if port.startswith("x") else t[:, order] for port, t in tensors.items()}
    expected = case.answer(tensors, own)[:, order]
    got = case.answer(moved, {name: _by_head(t, order, case) for name, t in own.items()})
    _expect(_distance(got, expected) <= 1e-5, f"{case}: heads in order {order.tolist()}", got, expected)
    return 1


@of_each(_small)
def heads_apart(case: Case) -> int:
    """Other numbers in the last head leave the other heads' answers as they are."""
    if not case.mechanism.heads_apart or case.alone or case.heads == 1:
        return 0
    tensors, own = case.tensors(), case.own()
    changed = {port: t if port.startswith("x") else _from(t, 1, case.heads - 1) for port, t in tensors.items()}
    expected, got = case.answer(tensors, own)[:, :-1], case.answer(changed, own)[:, :-1]
    _expect(_distance(got, expected) <= 1e-5, f"{case}: heads change with the last head", got, expected)
    return 1


@of_each(_small)
def batches_apart(case: Case) -> int:
    """A sample's answer does not depend on the other samples of its batch."""
    for sample, (together, alone) in enumerate(_with_and_without_others(case)):
        apart = _distance(together, alone)
        if 1e-5 < apart <= 1e-4 * float(together.abs().max()):  # rounding of large numbers? in float64 it would vanish
            wide = _with_and_without_others(replace(case, dtype=torch.float64))
            apart = _distance(*list(wide)[sample]) * 1e4
        _expect(apart <= 1e-5, f"{case}: sample {sample} alone", alone, together)
    return 1


def _with_and_without_others(case: Case) -> Iterator[tuple[Tensor, Tensor]]:
    """Each sample's answer within its batch, and its answer alone."""
    tensors, own = case.tensors(), case.own()
    both = case.answer(tensors, own)
    for sample in range(case.batch if case.batch > 1 else 0):
        yield both[sample : sample + 1], case.answer({p: t[sample : sample + 1] for p, t in tensors.items()}, own)


@of_each(_small)
def deterministic(case: Case) -> int:
    """Twice the same; what it draws, it draws by `draws`: without, torch's generator makes no difference."""
    seeds = (4, 4) if case.mechanism.draws(case.place(case.tensors()).site) else (4, 5)
    first, second = (case.answer(seed=seed) for seed in seeds)
    _expect(torch.equal(first, second), f"{case}: asked twice", second, first)
    return 1


@of_each(_small)
def inputs_untouched(case: Case) -> int:
    """Nothing that it is given is written to."""
    seen = torch.ones(case.batch, case.m, dtype=torch.bool)
    tensors, own = case.tensors(), case.own()
    mask = seen if _honours(case, tensors, "padding", {"mask": seen}) else None
    given = {**tensors, **{f"p.{name}": t for name, t in own.items()}, "key_padding": seen}
    before = {name: tensor.clone() for name, tensor in given.items()}
    with torch.no_grad():
        case.answer(tensors, own, mask=mask)
    written = [name for name, tensor in given.items() if not torch.equal(tensor, before[name])]
    if written:
        raise Failure(f"{case}: writes to {', '.join(written)}")
    return 1


@of_each(lambda m: _small(m, 7, 33))
def half_precision(wide: Case) -> int:
    """float16 and bfloat16 stay in their type, finite and near what the same numbers give in float64."""
    for dtype in (torch.float16, torch.bfloat16):
        case = replace(wide, dtype=dtype)
        tensors, own = case.tensors(), case.own()
        got = case.answer(tensors, own)
        exact = replace(wide, dtype=torch.float64).answer(_double(tensors), _double(own))
        if got.dtype != dtype:
            raise Failure(f"{case}: {got.dtype} out of {dtype}")
        near = 8 * torch.finfo(dtype).eps * (1 + float(exact.abs().max()))
        _expect(_distance(got, exact) <= near, f"{case} in {dtype}", got, exact)
    return 2


@of_each(lambda m: cases(m, sizes=(7,)))
def honoured(case: Case) -> int:
    """A key hidden by a padding mask, a mask or a bias of -1e4 may hold anything (features that it says it honours)."""
    tensors, own = case.tensors(), case.own()
    count = 0
    for key in sorted({case.m - 1, 0}):
        for feature, given in _hiding(case, key).items():
            if not _honours(case, tensors, feature, given):
                continue
            changed = {p: _at(t, case.leading(p), key) if p in "kv" or case.alone else t for p, t in tensors.items()}
            expected, got = case.answer(tensors, own, **given), case.answer(changed, own, **given)
            if case.alone:  # the hidden token's own row may be anything
                expected, got = (torch.cat((t[:, :key], t[:, key + 1 :]), 1) for t in (expected, got))
            _expect(_distance(got, expected) <= 1e-5, f"{case}: key {key} hidden by {feature}", got, expected)
            count += 1
    return count


@of_each(lambda m: cases(m, sizes=(7,)))
def empty_rows(case: Case) -> int:
    """A sample without one real key gives finite numbers and finite gradients."""
    own = case.own()
    padding = torch.ones(case.batch, case.m, dtype=torch.bool)
    padding[-1] = False
    whole = padding[:, None, None, :].expand(case.batch, 1, case.n, case.m)
    count = 0
    for feature, mask in {"padding": padding, "mask": whole}.items():
        tensors = {port: t.requires_grad_(t.is_floating_point()) for port, t in case.tensors().items()}
        if (case.alone and feature == "mask") or not _honours(case, tensors, feature, {"mask": mask}):
            continue
        answer = case.answer(tensors, own, mask=mask)
        if not torch.isfinite(answer).all():
            raise Failure(f"{case}: a sample whose keys are all hidden by {feature} is not finite")
        leaves = [t for t in tensors.values() if t.requires_grad]
        found = torch.autograd.grad(answer.square().sum(), leaves, allow_unused=True) if answer.requires_grad else ()
        if not all(g is None or torch.isfinite(g).all() for g in found):
            raise Failure(f"{case}: a sample whose keys are all hidden by {feature} has gradients that are not finite")
        count += 1
    return count


@of_each(
    lambda m: cases(m, sizes=(12,), only=lambda c: c.grid is None and m.part == "core" and c.pattern == "causal-self")
)
def decode_is_prefill(small: Case) -> int:
    """Token by token, or in chunks, gives what the whole sequence gives; a mechanism that cannot decode says why."""
    case = replace(small, dtype=torch.float64)
    m, tensors, own = case.mechanism, case.tensors(), case.own()
    extra = sorted(set(tensors) - {"q", "k", "v"})
    if extra:
        raise Beside(f"needs {', '.join(extra)} at every step")
    try:
        decoder = Decoder(m, case.place(tensors).site, params=own)
    except Refused as refused:
        raise Beside(f"not derived: {refused.found}") from None
    whole = case.answer(tensors, own)
    q, k, v = (tensors[port] for port in "qkv")
    for cut in sorted({1, max(1, case.n // 2)}):
        pieces = [(0, cut), *((n, n + 1) for n in range(cut, case.n))]
        answers = [
            (decoder.step if start else decoder.prefill)(*(t[:, :, start:stop] for t in (q, k, v)))
            for start, stop in pieces
        ]
        got = torch.cat(answers, 2)
        if got.shape != whole.shape:
            raise Failure(f"{case}: decoded to shape {tuple(got.shape)}, not {tuple(whole.shape)}")
        if _distance(got, whole) > 1e-5:
            row = int((got - whole).abs().movedim(2, 0).flatten(1).amax(1).gt(1e-5).nonzero()[0])
            where = f"{case}: row {row} after a prefill of {cut}"
            _expect(False, where, got, whole)
    return 1


def written_as_text(m: Mechanism) -> int:
    """Its knobs survive YAML: what a recipe says is what stands in the model."""
    if mechanisms().get(m.slug) is not type(m):
        raise Failure(f"{m!r}: not registered under {m.slug!r}")
    knobs = {name: getattr(m, name) for name in m.knobs()}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in knobs.items()}
    try:
        read = mechanism(m.slug, **yaml.safe_load(yaml.safe_dump(plain)))
    except (yaml.YAMLError, Refused) as error:
        raise Failure(f"{m!r}: {first_lines(error)}") from None
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


@of_each(lambda m: _one_per_pattern(m))
def exported(case: Case) -> int:
    """torch.export takes it, with open sizes unless it has a grid or refuses them, and the graph gives the same."""
    tensors = case.tensors()
    layer = _Exportable(case, tuple(tensors))
    dynamic = None
    if case.grid is None and case.n > 1:
        dynamic = (tuple({case.leading(p): torch.export.Dim.AUTO} for p in tensors),)
    try:
        with torch.no_grad():
            try:
                graph = torch.export.export(layer, tuple(tensors.values()), dynamic_shapes=dynamic, strict=False)
            except Refused:  # it must know the length, and says so; the tensors of before are marked as open
                dynamic = None
                graph = torch.export.export(layer, tuple(t.clone() for t in tensors.values()), strict=False)
    except Exception as error:  # whatever export raises is the answer
        raise Failure(f"{case}: torch.export: {first_lines(error)}") from None
    other = replace(case, n=case.n + 4, m=case.m + 4) if dynamic else case
    try:
        with from_seed(4):  # what it draws, it draws as in `other.answer`
            got = graph.module()(*other.tensors().values())
    except (AssertionError, RuntimeError) as error:
        raise Failure(f"{other}: exported at N={case.n}: {first_lines(error)}") from None
    expected = other.answer(other.tensors(), case.own())
    _expect(_distance(got, expected) <= 1e-5, f"{other}: exported at N={case.n}", got, expected)
    return 1


QUESTIONS = tuple(
    Question(name, says, ask)
    for name, says, ask in (
        ("limits", "its exact cases hold", limits_hold),
        ("lengths", "any length, cross, grouped heads, grids", lengths),
        ("causal", "causal never looks ahead", never_looks_ahead),
        ("gradients", "gradients are those of finite differences", gradients),
        ("heads", "permuting heads commutes", heads_commute),
        ("apart", "heads do not see one another", heads_apart),
        ("batch", "samples do not mix", batches_apart),
        ("deterministic", "twice the same", deterministic),
        ("inputs", "writes to nothing it is given", inputs_untouched),
        ("half", "float16 and bfloat16 run", half_precision),
        ("honours", "hidden keys do not matter", honoured),
        ("empty rows", "a row without keys is finite", empty_rows),
        ("decode", "token by token is the whole", decode_is_prefill),
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
    for case in cases(m, sizes=(7, 8), only=lambda case: not case.grouped):
        kind = (case.pattern, case.grid is None)
        if kind not in seen:
            seen.add(kind)
            yield case


def _honours(case: Case, tensors: Mapping[str, Tensor], feature: str, given: Mapping[str, Any]) -> bool:
    """Whether a mechanism says that it honours a feature, and stands where the site has it."""
    m = case.mechanism
    return feature in m.honours and m.refuses(case.place(tensors, **given).site) is None


def _hiding(case: Case, key: int) -> dict[str, dict[str, Any]]:
    seen = torch.ones(case.batch, case.m, dtype=torch.bool)
    seen[:, key] = False
    if case.alone:
        return {"padding": {"mask": seen}}
    bias = torch.zeros(1, case.heads, case.n, case.m)
    bias[..., key] = -1e4
    whole = seen[:, None, None, :].expand(case.batch, 1, case.n, case.m)
    hiding: dict[str, dict[str, Any]] = {"padding": {"mask": seen}, "mask": {"mask": whole}, "bias": {"bias": bias}}
    if key < case.m - 1:
        del hiding["bias"]  # a row that sees nothing else is not made empty by a number
    return hiding


def _from(tensor: Tensor, axis: int, start: int) -> Tensor:
    """The tensor with other numbers from one token on."""
    return _other(tensor, axis, start, tensor.shape[axis] - start)


def _at(tensor: Tensor, axis: int, place: int) -> Tensor:
    """The tensor with other numbers at one token."""
    return _other(tensor, axis, place, 1)


def _other(tensor: Tensor, axis: int, start: int, count: int) -> Tensor:
    changed = tensor.clone()
    part = changed.narrow(axis, start, count)
    part.copy_(3.0 - 2.0 * part)
    return changed


def _by_head(tensor: Tensor, order: Tensor, case: Case) -> Tensor:
    """A learned tensor's heads in another order: its axis of H, or of H * D channels."""
    for axis, size in enumerate(tensor.shape):
        if size == case.heads:
            return tensor.index_select(axis, order)
        if size == case.width:
            return tensor.unflatten(axis, (case.heads, case.dim)).index_select(axis, order).flatten(axis, axis + 1)
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
