"""From a model and one call to a plain graph in the ATen training IR, with batch and sequence dynamic."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from .containers import Layout, Leaf, absorb, put_together, take_apart
from .graph_state import graph_from, state_of
from .leaves import plain_calls, stamp_leaves
from .plain_graph import plain, written
from .ranges import Sizes, Symbol
from .refusal import Refused
from .signature import Call, SignatureKey, forward_signature, rebuild

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MUTABLE = ("object", "mapping", "items")


@dataclass
class Captured:
    """A model's graph for one call signature, and what it takes to run it on a call and rebuild the output."""

    graph: fx.GraphModule
    key: SignatureKey
    layouts: tuple[tuple[str, Layout], ...]  # the arguments
    output: Layout
    grown: tuple[tuple[str, Layout], ...]  # arguments that the call changes in place (caches), as they are afterwards
    dims: Sizes
    writes: tuple[str, ...] = ()  # buffers that a run writes to
    notes: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()  # what a rewritten graph gives behind its outputs: named losses,
    buffers: tuple[str, ...] = ()  # then new values of these buffers, to be written in train()

    def extras(self, flat: Sequence[Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The named losses and new buffer values of a run."""
        start = self.output.count + sum(layout.count for _, layout in self.grown)
        middle = start + len(self.losses)
        return dict(zip(self.losses, flat[start:middle])), dict(zip(self.buffers, flat[middle:]))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"graph": state_of(self.graph)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"graph": graph_from(state["graph"])})

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Raise Refused where the sizes of a call are outside the captured range."""
        self.dims.check(tensors)

    def inputs(self, call: Call) -> tuple[Tensor, ...]:
        """The flat tensors of a call, caches that are still empty given tensors of length 0."""
        given = call.tensors
        if all(t is not None for t in given):
            return given  # type: ignore[return-value]
        first = next(t for t in given if t is not None)
        return tuple(t if t is not None else self._empty(k, first) for k, t in enumerate(given))

    def result(self, call: Call, flat: Sequence[Any]) -> Any:
        """The output as the model gives it, from the graph's flat one; arguments that grow are grown."""
        values, start = dict(call.values), self.output.count
        for name, layout in self.grown:
            absorb(values[name], put_together(layout, flat[start : start + layout.count]))
            start += layout.count
        return put_together(self.output, flat[: self.output.count], values)

    def _empty(self, index: int, first: Tensor) -> Tensor:
        shape = list(self.dims.shapes[index])
        sizes = [first.shape[0], shape[1], 0, *shape[3:]]
        return torch.zeros(sizes, dtype=self.dims.dtypes[index], device=first.device)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Attempt:
    """One way to export: the example's tensors and which of their dimensions are left open."""

    tensors: tuple[Tensor, ...]
    open: tuple[frozenset[int], ...]


@dataclass
class Seen:
    """What tracing told about the call beside its graph."""

    output: Layout = field(default_factory=lambda: Layout("value"))
    grown: tuple[tuple[str, Layout], ...] = ()
    forgotten: set[str] = field(default_factory=set)  # attributes that the forward set to a tensor


def capture(
    model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, *, dynamic: bool = True
) -> Captured:
    """The graph of one call. The model is left as it was, also where that fails."""
    call = Call.of(forward_signature(model), args, kwargs)
    example = _filled(model, call)
    reasons: list[str] = []
    attempts = _attempts(call, example) if dynamic else [Attempt(example, (frozenset(),) * len(example))]
    error: Exception | None = None
    for attempt in attempts:
        try:
            captured = _export(model, call, attempt)
        except Refused:
            raise
        except Exception as failed:
            error = error or failed
            reasons.append(_reason(failed))
            continue
        notes = _static(captured.dims, attempts[0], reasons) if dynamic else ()
        return replace(captured, notes=(*notes, *captured.notes))
    fits = "no branches on tensor values, no .item(), tensors in and out; or capture its parts"
    raise Refused(reasons[-1], where=type(model).__name__, fits=fits) from error


def setting(model: nn.Module) -> tuple[str, ...]:
    """What a graph depends on beside the call: the mode, and the dtype and device of the weights."""
    modes = {m.training for m in model.modules()}
    if len(modes) == 2:
        inside = "".join("te"[not m.training] for m in model.modules())
        mode = f"{'train' if model.training else 'eval'} mixed {hash(inside) & 0xFFFF:04x}"
    else:
        mode = "train" if model.training else "eval"
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if weight is None:
        return (mode,)
    device = "" if weight.device.type == "cpu" else f" {weight.device}"
    return mode, f"{str(weight.dtype).removeprefix('torch.')}{device}"


# --- the example ------------------------------------------------------------------------------------------------------

_QUERIES, _PAST = 3, 10  # sizes of a decoder's example call: none of them 0 or 1, which torch.export takes as constants


def _filled(model: nn.Module, call: Call) -> tuple[Tensor, ...]:
    """The call's tensors; a cache that is empty is filled by one run, to learn its shapes."""
    if not any(_cached(leaf) for leaf in call.leaves):
        return call.tensors  # type: ignore[return-value]
    leaves = call.leaves
    if any(leaf.tensor is None for leaf in leaves):
        leaves = _after_one_run(model, call)
    batch, queries, past = _decoder_sizes(call)
    return tuple(_resized(leaf, ours, batch, queries, past) for leaf, ours in zip(leaves, call.leaves, strict=True))


def _cached(leaf: Leaf) -> bool:
    return ".layers." in leaf.path


def _after_one_run(model: nn.Module, call: Call) -> tuple[Leaf, ...]:
    args, kwargs = copy.deepcopy((call.args, dict(call.kwargs)))
    with torch.no_grad(), unchanged(model):
        model(*args, **kwargs)
    after = Call.of(call.signature, args, kwargs)
    if len(after.leaves) != len(call.leaves):
        raise Refused("a cache without layers", where="past_key_values", fits="DynamicCache(config=model.config)")
    return after.leaves


def _decoder_sizes(call: Call) -> tuple[int, int, int]:
    plain_tensors = [leaf.tensor for leaf in call.leaves if not _cached(leaf) and leaf.tensor is not None]
    keys = [leaf.tensor for leaf in call.leaves if leaf.path.endswith(".keys") and leaf.tensor is not None]
    first = next(t for t in plain_tensors if t.ndim > 1)
    return first.shape[0], first.shape[1], keys[0].shape[2] if keys else 0


def _resized(leaf: Leaf, ours: Leaf, batch: int, queries: int, past: int) -> Tensor:
    tensor = leaf.tensor
    assert tensor is not None
    sizes = list(tensor.shape)
    if _cached(leaf):
        if tensor.ndim == 4:
            sizes[0], sizes[2] = 2, _PAST
        elif tensor.ndim == 2:
            sizes[0] = _PAST
        return torch.zeros(sizes, dtype=tensor.dtype, device=tensor.device)
    if sizes and sizes[0] == batch:
        sizes[0] = 2
    keys_too = "mask" in leaf.path
    for dim in range(1, len(sizes)):
        if sizes[dim] == queries + past and (past or (keys_too and dim == len(sizes) - 1)):
            sizes[dim] = _QUERIES + _PAST
        elif sizes[dim] == queries and dim < max(2, len(sizes) - 1):
            sizes[dim] = _QUERIES
    return torch.ones(sizes, dtype=tensor.dtype, device=tensor.device)


def _attempts(call: Call, example: tuple[Tensor, ...]) -> list[Attempt]:
    """From everything open to nothing; sizes of 1 doubled first, since torch.export takes them as constants."""
    both = tuple(_open(leaf, t) for leaf, t in zip(call.leaves, example, strict=True))
    batch = tuple(o & {0} for o in both)
    doubled, batches = _doubled(example, both), _doubled(example, batch)
    ways = [Attempt(doubled, both), Attempt(batches, both), Attempt(batches, batch)]
    ways = [w for k, w in enumerate(ways) if not any(_alike(w, before) for before in ways[:k])]
    return [*ways, Attempt(example, (frozenset(),) * len(example))]


def _alike(one: Attempt, other: Attempt) -> bool:
    return one.open == other.open and all(a.shape == b.shape for a, b in zip(one.tensors, other.tensors))


def _open(leaf: Leaf, tensor: Tensor) -> frozenset[int]:
    if not tensor.ndim:
        return frozenset()
    if _cached(leaf):
        return frozenset({0, 2} if tensor.ndim == 4 else {0} if tensor.ndim == 2 else ())
    whole = not tensor.is_floating_point()
    if tensor.ndim == 4 and "mask" in leaf.path:
        return frozenset({0, 2, 3})
    sequence = tensor.ndim >= 2 and (whole or tensor.ndim == 3 or (tensor.ndim == 2 and "mask" in leaf.path))
    return frozenset({0, 1} if sequence else {0})


def _doubled(example: tuple[Tensor, ...], opened: tuple[frozenset[int], ...]) -> tuple[Tensor, ...]:
    def double(tensor: Tensor, dims: frozenset[int]) -> Tensor:
        times = [2 if d in dims and size == 1 else 1 for d, size in enumerate(tensor.shape)]
        return tensor.repeat(times) if 2 in times else tensor

    return tuple(double(t, o) for t, o in zip(example, opened))


# --- the export -------------------------------------------------------------------------------------------------------


def _export(model: nn.Module, call: Call, attempt: Attempt) -> Captured:
    seen = Seen()
    flat = _flat(model, call, attempt, seen)
    shapes = tuple(dict.fromkeys(sorted(dims), torch.export.Dim.AUTO) or None for dims in attempt.open)
    tensors = tuple(t.detach() for t in attempt.tensors)  # one object passed twice would become one input
    grad = torch.is_grad_enabled()
    try:
        with torch.no_grad(), unchanged(model), _quiet(), plain_calls(model) as leaves:
            program = torch.export.export(flat, tensors, dynamic_shapes=(shapes,), strict=False)
    finally:
        torch.set_grad_enabled(grad)
    graph = plain(program, model, [leaf.path for leaf in call.leaves])
    stamp_leaves(graph, leaves)
    return Captured(
        graph=graph,
        key=call.key(setting(model)),
        layouts=call.layouts,
        output=seen.output,
        grown=seen.grown,
        dims=_sizes(graph, program, call),
        writes=written(graph),
        notes=tuple(f"{name} is not set by the captured forward" for name in sorted(seen.forgotten)),
    )


def _flat(model: nn.Module, call: Call, attempt: Attempt, seen: Seen) -> nn.Module:
    """The same model with a forward that takes and gives flat tensors; it shares everything but its own hooks."""
    view = object.__new__(type(model))
    view.__dict__ = dict(model.__dict__) | {name: OrderedDict() for name in _HOOKS}
    own = model.__dict__.get("forward") or type(model).forward.__get__(view)

    def forward(*tensors: Tensor) -> tuple[Any, ...]:
        _relate(call, tensors, attempt)
        values, args, kwargs = rebuild(call.signature, call.layouts, tensors)
        given = [leaf for name, value in values.items() for leaf in take_apart(value, name)[0]]
        with _forgotten(view, seen.forgotten):
            answer = own(*args, **kwargs)
        extra = _grown(call, values, given, seen)
        named = {id(v): n for n, v in values.items() if dict(call.layouts)[n].kind in _MUTABLE}
        leaves, seen.output = take_apart(answer, "", named)
        return tuple(leaf.tensor for leaf in (*leaves, *extra))

    view.__dict__["forward"] = forward
    return view


def _relate(call: Call, tensors: Sequence[Tensor], attempt: Attempt) -> None:
    """Sizes that are one and the same are said to be: the batch of all inputs, the lengths of a cache."""
    firsts: dict[str, Any] = {}
    for leaf, tensor, example, dims in zip(call.leaves, tensors, attempt.tensors, attempt.open, strict=True):
        if 0 in dims and (not _cached(leaf) or tensor.ndim == 4):
            batch, size = firsts.setdefault("batch", (tensor.shape[0], example.shape[0]))
            if size == example.shape[0]:
                torch._check(tensor.shape[0] == batch)
        if 2 in dims and _cached(leaf):
            past, size = firsts.setdefault("past", (tensor.shape[2], example.shape[2]))
            if size == example.shape[2]:
                torch._check(tensor.shape[2] == past)


def _grown(call: Call, values: Mapping[str, Any], given: Sequence[Leaf], seen: Seen) -> list[Leaf]:
    """Tensors of the arguments that the call changed in place."""
    before = {leaf.path: leaf.tensor for leaf in given}
    found: list[Leaf] = []
    grown = []
    for name, layout in call.layouts:
        if layout.kind in _MUTABLE:
            leaves, after = take_apart(values[name], name)
            if after != layout or any(before.get(leaf.path) is not leaf.tensor for leaf in leaves):
                found += leaves
                grown.append((name, after))
    seen.grown = tuple(grown)
    return found


def _sizes(graph: fx.GraphModule, program: torch.export.ExportedProgram, call: Call) -> Sizes:
    values = [n.meta["val"] for n in graph.graph.find_nodes(op="placeholder")]
    shapes = tuple(tuple(map(_size, v.shape)) for v in values)
    symbols = {str(s): Symbol(str(s), int(r.lower), _most(r.upper)) for s, r in program.range_constraints.items()}
    used = {t for shape in shapes for t in shape if isinstance(t, str)}
    symbols = {n: s for n, s in symbols.items() if n in used}
    guards = tuple(g for g in program._guards_code if "L[" in g)
    return Sizes(tuple(leaf.path for leaf in call.leaves), shapes, tuple(v.dtype for v in values), symbols, guards)


def _size(size: Any) -> int | str:
    expression = size.node.expr if isinstance(size, torch.SymInt) else None
    return int(size) if expression is None or expression.is_number else str(expression)


def _most(bound: Any) -> int | None:
    return int(bound) if bound.is_Integer and int(bound) < 2**60 else None


# --- what was found ---------------------------------------------------------------------------------------------------


def _static(dims: Sizes, wanted: Attempt, reasons: Sequence[str]) -> tuple[str, ...]:
    """Which dimensions were to be dynamic and are not, with the reason."""
    why = f"because {reasons[0]}" if reasons else "because the model fixes it"
    fixed: dict[str, list[str]] = {}
    for name, shape, asked in zip(dims.inputs, dims.shapes, wanted.open, strict=True):
        for dim in sorted(asked):
            if isinstance(shape[dim], int):
                fixed.setdefault("batch" if dim == 0 else "sequence", []).append(f"{name} dim {dim} = {shape[dim]}")
    return tuple(f"{kind} static ({', '.join(places)}) {why}" for kind, places in fixed.items())


def _reason(error: Exception) -> str:
    """The first line of what torch.export said, with the line of the user's code that it happened in."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    place = ""
    trace = error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if "/torch/" not in name and not name.startswith("<") and name != __file__:
            place = f" ({name.rsplit('/', 1)[-1]}:{trace.tb_lineno}, in {trace.tb_frame.f_code.co_name})"
        trace = trace.tb_next
    return f"{said[:200]}{place}"


# --- leaving things as they were --------------------------------------------------------------------------------------


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Attributes, buffers, hooks and modes of all modules are put back, whatever happens inside."""
    before = [(m, dict(m.__dict__), _contents(m)) for m in model.modules()]
    try:
        yield
    finally:
        for module, attributes, contents in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for held, inside in contents:
                held.clear()
                held.update(inside)


def _contents(module: nn.Module) -> list[tuple[dict[Any, Any], dict[Any, Any]]]:
    return [(held, dict(held)) for held in module.__dict__.values() if isinstance(held, dict)]


@contextmanager
def _forgotten(model: nn.Module, names: set[str]) -> Iterator[None]:
    """Tensors that a forward keeps on its modules are not kept: while tracing they are fake."""
    before = [(path, m, dict(m.__dict__)) for path, m in model.named_modules()]
    yield
    for path, module, attributes in before:
        for name, value in list(module.__dict__.items()):
            if isinstance(value, Tensor) and attributes.get(name) is not value:
                names.add(f"{path}.{name}" if path else name)
                if name in attributes:
                    module.__dict__[name] = attributes[name]
                else:
                    del module.__dict__[name]


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.export logs each dimension that it fixes; the notes say that in one line."""
    logger = logging.getLogger("torch._export.non_strict_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
