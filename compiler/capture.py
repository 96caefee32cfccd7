"""From a model and one call to a plain graph in the ATen training IR, with batch and sequence dynamic."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from . import chance, data_read
from .attempts import Attempt, attempts, filled, of_tokens
from .checkpointing import unflagged
from .containers import MUTABLE, Layout, Leaf, absorb, lay_out_caches, put_together, take_apart
from .fused_layers import cast_as_fused, masks_as_given, may_fuse
from .graph_state import graph_from, state_of
from .inside import first_weight, inside
from .leaves import plain_calls, stamp_leaves
from .padding import KEPT, keeps_padding, packing, zeros_at_padding
from .plain_graph import operations, plain, without_growth, written
from .ranges import Sizes, Symbol
from .refusal import Refused, Uncapturable
from .regions import open_regions
from .signature import Call, SignatureKey, forward_signature, rebuild
from .untouched import forgotten, quiet, unchanged

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_FITS = "no branches on tensor values, no .item(), tensors in and out; or capture its parts"
_FITS_CHANCE = "draws by torch's own functions, without a seed, which a graph has; or the option that turns them off"


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
    buffers: tuple[str, ...] = ()  # then new values of these buffers, to be written in train(),
    traces: tuple[str, ...] = ()  # then named values to look at
    called: tuple[str, ...] = ()  # the model's own modules that the graph calls
    operations: tuple[str, ...] = ()  # what the model computed, reshaping aside, before any rewrite
    replaced: Mapping[str, nn.Module] = field(default_factory=dict)  # layers to be put where the model's own stand

    @property
    def extra(self) -> int:
        """How many outputs stand behind the model's own."""
        return len(self.losses) + len(self.buffers) + len(self.traces)

    def extras(self, flat: Sequence[Any]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """The named losses, new buffer values and values to look at of a run."""
        rest = iter(flat[self.output.count + sum(layout.count for _, layout in self.grown) :])
        losses, buffers, traces = ({name: next(rest) for name in n} for n in (self.losses, self.buffers, self.traces))
        return losses, buffers, traces

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"graph": state_of(self.graph)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"graph": graph_from(state["graph"])})

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Raise Refused where the sizes of a call are outside the captured range."""
        self.dims.check(tensors)

    def fits(self, call: Call) -> bool:
        """Whether the sizes of a call are within the captured range."""
        try:
            self.check(self.inputs(call))
        except Refused:
            return False
        return True

    def asks_again(self, call: Call) -> bool:
        """Whether a call's sizes of 0 and 1, its cache still empty, may need a graph of their own."""
        return bool(self.grown) and bool(self.dims.small(self.inputs(call)))

    def inputs(self, call: Call) -> tuple[Tensor, ...]:
        """The flat tensors of a call, caches that are still empty given tensors of length 0."""
        given = call.tensors
        if all(t is not None for t in given):
            return given  # type: ignore[return-value]
        known = [t for t in given if t is not None]
        first = of_tokens(known) if any(t.ndim > 1 for t in known) else known[0]
        return tuple(t if t is not None else self._empty(k, call.leaves[k], first) for k, t in enumerate(given))

    def result(self, call: Call, flat: Sequence[Any]) -> Any:
        """The output as the model gives it, from the graph's flat one; arguments that grow are grown."""
        values, start = dict(call.values), self.output.count
        for name, layout in self.grown:
            absorb(values[name], put_together(layout, flat[start : start + layout.count]))
            start += layout.count
        return put_together(self.output, flat[: self.output.count], values)

    def _empty(self, index: int, leaf: Leaf, first: Tensor) -> Tensor:
        shape = list(self.dims.shapes[index])
        sizes = [first.shape[0], *shape[1:]] if leaf.whole else [first.shape[0], shape[1], 0, *shape[3:]]
        return torch.zeros(sizes, dtype=self.dims.dtypes[index], device=first.device)  # type: ignore[arg-type]


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
    lay_out_caches(model, (*args, *(kwargs or {}).values()))
    call = Call.of(forward_signature(model), args, kwargs)
    example = filled(model, call)
    reasons: list[str] = []
    ways = attempts(call, example) if dynamic else [Attempt(example, (frozenset(),) * len(example))]
    error: Exception | None = None
    for attempt in ways:
        try:
            captured = export(model, call, attempt)
        except Refused:
            raise
        except Exception as failed:  # torch.export and the model's own code raise anything: it is the reason reported
            error = error or failed
            reasons.append(_reason(failed))
            if _at_any_size(failed):
                break
            continue
        if any(_fixed_elsewhere(shape, own) for shape, own in zip(captured.dims.shapes, example, strict=True)):
            continue  # the model fixes a size that was doubled here: its graph would not be one of this call
        notes = _static(captured.dims, ways[0], reasons) if dynamic else ()
        return replace(captured, notes=(*notes, *captured.notes))
    raise Uncapturable(reasons[-1], where=type(model).__name__, fits=_way_out(model, error)) from error


def _way_out(model: nn.Module, error: Exception | None) -> str:
    if model.training and (drawn := chance.layers_drawn(model)):
        return f"{' and '.join(drawn)} of 0 while it trains: a graph has all layers, and each call draws which ones run"
    return _FITS_CHANCE if isinstance(error, chance.UnseenChance) else _FITS


def operations_at(model: nn.Module, call: Call, attempt: Attempt) -> tuple[str, ...]:
    """What the model computes at these sizes; nothing where it cannot be captured at them."""
    try:
        return export(model, call, attempt).operations
    except Exception:  # anything at all, as in `capture`: sizes at which nothing is known
        return ()


def setting(model: nn.Module) -> tuple[str, ...]:
    """What a graph depends on beside the call: the mode, the dtype and device of the weights, autocast."""
    mode, modes = "train" if model.training else "eval", [module.training for module in inside(model)]
    if True in modes and False in modes:
        code = int("".join(["01"[each] for each in modes]), 2) % 65521  # torch.compile cannot trace zlib or hashlib
        mode = f"{mode} mixed {code:04x}"
    weight = first_weight(model)
    if weight is None:
        return (mode, *_autocast("cpu"))
    own = ((KEPT,) if keeps_padding(model) else ()) + (("fused layers",) if may_fuse(model) else ())
    device = "" if weight.device.type == "cpu" else f" {weight.device}"
    return mode, f"{str(weight.dtype).removeprefix('torch.')}{device}", *_autocast(weight.device.type), *own


def _autocast(device: str) -> tuple[str, ...]:
    """Operators choose their dtypes by it, and `x.to(y.dtype)` is in a graph as what y had at capture."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return ()
    return (f"autocast {str(torch.get_autocast_dtype(device)).removeprefix('torch.')}",)


# --- the export -------------------------------------------------------------------------------------------------------


def export(model: nn.Module, call: Call, attempt: Attempt) -> Captured:
    """The graph of a call at an attempt's sizes; it raises whatever torch.export or the model raises."""
    seen = Seen()
    program, leaves = _traced(model, call, attempt, seen)
    graph = plain(program, model, [leaf.path for leaf in call.leaves])
    grown = without_growth(graph)
    open_regions(graph)
    stamp_leaves(graph, leaves)
    return Captured(
        graph=graph,
        key=call.key(setting(model)),
        layouts=call.layouts,
        output=seen.output,
        grown=seen.grown,
        dims=_sizes(graph, program, call),
        writes=written(graph),
        operations=operations(graph),
        notes=(
            *(f"{name} is not set by the captured forward" for name in sorted(seen.forgotten)),
            *(f"{name} is not kept as large as a call makes it: every such call makes it anew" for name in grown),
        ),
    )


def _traced(
    model: nn.Module, call: Call, attempt: Attempt, seen: Seen
) -> tuple[torch.export.ExportedProgram, set[str]]:
    """What torch.export makes of it, and the leaf modules that it called.

    A forward that draws numbers in Python is traced with several: it is taken where all of them give one program.
    """
    flat = _flat(model, call, attempt, seen)
    shapes = tuple(dict.fromkeys(sorted(dims), torch.export.Dim.AUTO) or None for dims in attempt.open)
    tensors = tuple(t.detach() for t in attempt.tensors)  # one object passed twice would become one input

    def exported(draws: AbstractContextManager[Any]) -> tuple[torch.export.ExportedProgram, Any]:
        with (
            torch.no_grad(),
            unchanged(model),
            cast_as_fused(model, fused=fused),
            masks_as_given(),
            data_read.DataAsDetached(),
            quiet(),
            _fakes(attempt),
            draws,
            zeros_at_padding(packs),
            plain_calls(model) as leaves,
        ):
            unflagged(model)
            return torch.export.export(flat, tensors, dynamic_shapes=(shapes,), strict=False), leaves

    grad, fused, packs = torch.is_grad_enabled(), may_fuse(model), packing(model)
    try:
        return exported(chance.no_unseen_chance())
    except chance.UnseenChance:
        first, *others = [exported(chance.drawing(number)) for number in chance.SAMPLES]
        if not all(_same_program(first[0], program) for program, _ in others):
            raise
        return first
    finally:
        torch.set_grad_enabled(grad)


def _same_program(one: torch.export.ExportedProgram, other: torch.export.ExportedProgram) -> bool:
    """The same operations on the same constants."""
    alike = str(one.graph) == str(other.graph) and list(one.constants) == list(other.constants)
    pairs = zip(one.constants.values(), other.constants.values(), strict=True) if alike else ()
    return alike and all(torch.equal(a, b) if isinstance(a, Tensor) else a is b for a, b in pairs)


def _fakes(attempt: Attempt) -> AbstractContextManager[Any]:
    """Looking fake results up by open sizes takes longer than computing them: a llama is captured 1.4 times faster."""
    if any(attempt.open):
        return torch._dynamo.config.patch(fake_tensor_cache_enabled=False)
    return nullcontext()


def _flat(model: nn.Module, call: Call, attempt: Attempt, seen: Seen) -> nn.Module:
    """The same model with a forward that takes and gives flat tensors; it shares everything but its own hooks."""
    view = object.__new__(type(model))
    view.__dict__ = dict(model.__dict__) | {name: OrderedDict() for name in _HOOKS}
    own = model.__dict__.get("forward") or type(model).forward.__get__(view)

    def forward(*tensors: Tensor) -> tuple[Any, ...]:
        _relate(call, tensors, attempt)
        values, args, kwargs = rebuild(call.signature, call.layouts, tensors)
        given = [leaf for name, value in values.items() for leaf in take_apart(value, name)[0]]
        with forgotten(view, seen.forgotten):
            answer = own(*args, **kwargs)
        extra = _grown(call, values, given, seen)
        named = {id(v): n for n, v in values.items() if dict(call.layouts)[n].kind in MUTABLE}
        leaves, seen.output = take_apart(answer, "", named)
        return tuple(leaf.tensor for leaf in (*leaves, *extra))

    view.__dict__["forward"] = forward
    return view


def _relate(call: Call, tensors: Sequence[Tensor], attempt: Attempt) -> None:
    """Sizes that are one and the same are said to be: the batch of all inputs, the lengths of a cache."""
    firsts: dict[str, Any] = {}
    for leaf, tensor, example, dims in zip(call.leaves, tensors, attempt.tensors, attempt.open, strict=True):
        if 0 in dims and (not leaf.cached or tensor.ndim == 4):
            batch, size = firsts.setdefault("batch", (tensor.shape[0], example.shape[0]))
            if size == example.shape[0]:
                torch._check(tensor.shape[0] == batch)
        if 2 in dims and leaf.cached:
            cache = f"{leaf.path.partition('.layers.')[0]} of {example.shape[2]}"
            torch._check(tensor.shape[2] == firsts.setdefault(cache, tensor.shape[2]))


def _grown(call: Call, values: Mapping[str, Any], given: Sequence[Leaf], seen: Seen) -> list[Leaf]:
    """Tensors of the arguments that the call changed in place."""
    before = {leaf.path: leaf.tensor for leaf in given}
    found: list[Leaf] = []
    grown = []
    for name, layout in call.layouts:
        if layout.kind in MUTABLE:
            leaves, after = take_apart(values[name], name)
            if after != layout or any(before.get(leaf.path) is not leaf.tensor for leaf in leaves):
                found += leaves
                grown.append((name, after))
    seen.grown = tuple(grown)
    return found


def _sizes(graph: fx.GraphModule, program: torch.export.ExportedProgram, call: Call) -> Sizes:
    values = [n.meta["val"] for n in graph.graph.find_nodes(op="placeholder")]
    shapes = tuple(tuple(map(_size, v.shape)) for v in values)
    used = {t for shape in shapes for t in shape if isinstance(t, str)}
    ranges = {str(s): r for s, r in program.range_constraints.items() if str(s) in used}  # others may be unbounded
    symbols = {n: Symbol(n, int(r.lower), _most(r.upper)) for n, r in ranges.items()}
    guards = tuple(g for g in program._guards_code if "L[" in g and ".stride()" not in g)  # a graph asks for sizes
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


def _fixed_elsewhere(shape: Sequence[int | str], own: Tensor) -> bool:
    return any(isinstance(size, int) and size != given for size, given in zip(shape, own.shape, strict=True))


def _at_any_size(error: Exception) -> bool:
    """Whether the export fails however many sizes are open: chance, and a question about tensor values alone."""
    if isinstance(error, GuardOnDataDependentSymNode):
        return not re.search(r"\bs\d", str(error).partition("\n")[0])  # s0 is an open size, u0 a value
    return isinstance(error, chance.UnseenChance)


def _reason(error: Exception) -> str:
    """The first line of what torch.export said, with the line of the user's code that it happened in."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    place = ""
    trace = error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if (
            "/torch/" not in name
            and not name.startswith("<")
            and name not in (__file__, chance.__file__, data_read.__file__)
        ):
            place = f" ({name.rsplit('/', 1)[-1]}:{trace.tb_lineno}, in {trace.tb_frame.f_code.co_name})"
        trace = trace.tb_next
    return f"{said[:200]}{place}"
