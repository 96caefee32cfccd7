"""A model whose forward runs captured graphs, one per call signature: still an instance of the user's own class."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .attempts import AS_GIVEN, Attempt
from .capture import Captured, operations_at, setting
from .checkpointing import cut_where_asked, run_graph
from .compiling import at_hand, make_ready
from .config_values import changed_config, config_values
from .containers import lay_out_caches
from .difference import said_frozen, said_limit
from .generating import generating
from .giving_way import giving_way
from .hooks import hook_numbers, refuse_silent_hooks, silent_hooks
from .hosting import STATE, Hosting, ProgramFor, hosting, original
from .leaves import in_their_places, leaves_of, modules_called, restore_leaves
from .mounting import mount
from .ownership import own_all, twin
from .part_alone import encoding, part_of
from .refusal import Refused, Uncapturable
from .ringed import as_captured
from .signature import Call, SignatureKey, forward_signature
from .trial import graph_alone_fails, must_run
from .turns import TURNS
from .untouched import same_statistics

log = logging.getLogger("reattend")


def host(model: nn.Module, program_for: ProgramFor, *, limit: int = 8, about: Any = None) -> nn.Module:
    """A twin of the model whose forward runs the graph that `program_for` makes for each call signature."""
    if limit < 1:
        raise Refused(
            f"max_signatures={limit}", where="optimize", fits="at least 1: how many kinds of calls get a graph"
        )
    hosted = twin(original(model))
    hosted.__class__ = hosted_class(type(hosted))  # type: ignore[arg-type]
    hosted.__dict__.pop("forward", None)
    hosted.__dict__[STATE] = Hosting(
        program_for,
        limit=limit,
        config=config_values(hosted),
        hooks=hook_numbers(hosted),
        leaves=leaves_of(hosted),
        about=about,
    )
    return hosted


def view_of(model: nn.Module, path: str, whole: Hosting, work: Any) -> nn.Module:
    """A part of a hosted model, hosted itself: the same modules and tensors, also when these are replaced or moved."""
    view: nn.Module = object.__new__(hosted_class(type(model)))  # type: ignore[arg-type]
    view.__dict__ = {n: v for n, v in model.__dict__.items() if n != "forward"}
    if path not in whole.parts:
        whole.parts[path] = Hosting(
            work.program_for, limit=whole.limit, config=config_values(view), leaves=leaves_of(view), about=work
        )
    view.__dict__[STATE] = whole.parts[path]
    return view


_WAYS_OUT: dict[str, Callable[..., Any]] = {}


def way_out(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Shipping stands above hosting; it announces what a hosted model's methods call."""

    def announce(function: Callable[..., Any]) -> Callable[..., Any]:
        _WAYS_OUT[name] = function
        return function

    return announce


def adopt(model: nn.Module, captured: Captured) -> None:
    """Give a hosted model a graph that was made for it elsewhere."""
    captured.called = modules_called(captured.graph)
    mount(captured, model)
    hosting(model).graphs[captured.key] = captured


def captured_for(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Captured:
    """The graph that a hosted model runs on a call."""
    _, captured, _ = _found(model, hosting(model), Call.of(forward_signature(model), args, kwargs))
    mount(captured, model)
    return captured


class HostedModel:
    """What a hosted model can do beside being the user's model; stands before the user's class in the generated one."""

    @property
    def graph(self) -> fx.GraphModule:
        """The rewritten graph of the signature called last, or the first one captured."""
        state = hosting(self)
        if not state.graphs:
            raise Refused("no call has been captured yet", where="graph", fits="call the model once, or give inputs")
        captured = state.graphs[state.current or next(iter(state.graphs))]
        mount(captured, self)  # type: ignore[arg-type]
        return captured.graph

    @property
    def report(self) -> Any:
        """What changed where, what was refused and why, deviation, time and cost."""
        found = hosting(self).about.report
        if found is None:
            raise Refused("no call has been captured yet", where="report", fits="call the model once, or give inputs")
        return found

    @property
    def sites(self) -> Any:
        """Where the model attends, and what stands there now."""
        return hosting(self).about.sites

    def _repr_html_(self) -> str | None:
        """In a notebook the report; before the first call the modules, as torch prints them."""
        found = getattr(hosting(self).about, "report", None)
        shown: str | None = None if found is None else found._repr_html_()
        return shown

    def part(self, path: str) -> nn.Module:
        """A module inside, called alone and rewritten as within the whole: `fast.model.encoder(x)` itself is not."""
        return part_of(self, path, view_of)  # type: ignore[arg-type]

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Make the graph of a call's signature without running it."""
        state = hosting(self)
        call = Call.of(forward_signature(self), args, kwargs)  # type: ignore[arg-type]
        _, captured, _ = _found(self, state, call)
        cut_where_asked(captured.graph, self)  # type: ignore[arg-type]

    @property
    def signatures(self) -> tuple[SignatureKey, ...]:
        return tuple(hosting(self).graphs)

    def freeze(self) -> None:
        """Capture no further signatures: a call that would need one is refused."""
        hosting(self).frozen = True

    def own_weights(self) -> None:
        """Copy every tensor that still shares memory with the original."""
        own_all(self)  # type: ignore[arg-type]

    def losses(self) -> dict[str, Tensor]:
        """The auxiliary losses of the last call, by name."""
        return dict(hosting(self).losses)

    def traces(self) -> dict[str, Tensor]:
        """What mechanisms gave to look at in the last call, by name."""
        return dict(hosting(self).traces)

    def new_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that the recipe added."""
        return ((n, p) for n, p in self.named_parameters() if "reattend" in n.split("."))  # type: ignore[attr-defined]

    def ships(self) -> Any:
        """How this model can leave the process: one line a route, with the reason for each no."""
        return _WAYS_OUT["ships"](self)

    def export(self, route: str, path: Any) -> Any:
        """Write the model as a stock checkpoint ("hf"), an ExportedProgram ("torch") or an AOTInductor package."""
        return _WAYS_OUT["export"](self, route, path)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty_hosted, (type(self)._reattend_made_from,), self.__dict__  # type: ignore[attr-defined]


giving_way(HostedModel)


@functools.cache
def hosted_class(made_from: type) -> type:
    """The subclass that hosts a class: same name and module, so that what asks for the name finds the user's own."""
    forward = made_from.forward  # type: ignore[attr-defined]

    @functools.wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        make_ready(self, args, kwargs)
        return _run(self, args, kwargs)

    body = {
        "forward": run,
        "__module__": made_from.__module__,
        "__qualname__": made_from.__qualname__,
        "__doc__": made_from.__doc__,
        "_reattend_made_from": made_from,
    }
    if hasattr(made_from, "save_pretrained"):
        body["save_pretrained"] = _saving(made_from)
    if hasattr(made_from, "generate"):
        body["generate"] = generating(made_from)
    if hasattr(made_from, "get_encoder"):
        body["get_encoder"] = encoding(made_from, view_of)
    return type(made_from)(made_from.__name__, (HostedModel, made_from), body)


def _saving(made_from: Any) -> Callable[..., Any]:
    """The class's own save_pretrained, with the rewritten graphs and the recipe beside its files."""

    @functools.wraps(made_from.save_pretrained)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        state, before = hosting(self), config_values(self)
        answer = made_from.save_pretrained(self, save_directory, *args, **kwargs)
        written = {n: v for n, v in config_values(self).items() if before.get(n) != v or n not in before}
        state.config = {**state.config, **written}  # what saving notes in the config changes no forward
        if kwargs.get("is_main_process", args[0] if args else True):
            _WAYS_OUT["write beside"](self, save_directory)
        return answer

    return save_pretrained


def _empty_hosted(made_from: type) -> Any:
    return object.__new__(hosted_class(made_from))


# --- a call -----------------------------------------------------------------------------------------------------------


def _run(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if torch.compiler.is_dynamo_compiling():  # is_compiling() also holds while another thread exports
        return _call(model, args, kwargs)
    try:
        with TURNS.beside():
            return _call(model, args, kwargs)
    except (Refused, torch.OutOfMemoryError):
        raise
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        with TURNS.alone():
            said = graph_alone_fails(original(model), args, kwargs, error)
        if said is None:
            raise
        raise said from error


def _call(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    state = hosting(model)
    lay_out_caches(model, (*args, *kwargs.values()))
    call = Call.of(forward_signature(model), args, kwargs)
    key, captured, tensors = _found(model, state, call)
    state.current = key
    refuse_silent_hooks(model, captured.called, state.hooks)
    flat = run_graph(captured.graph, model, tensors)
    _keep_extras(model, state, captured, flat)
    return captured.result(call, flat)


def _found(model: Any, state: Hosting, call: Call) -> tuple[SignatureKey, Captured, tuple[Tensor, ...]]:
    """The graph that says this call, made where there is none yet, and the tensors that it reads."""
    key = _key(model, state, call)
    captured = at_hand(state.graphs, key) or _captured(model, state, call, key)
    tensors = captured.inputs(call)
    try:
        captured.check(tensors)
    except Refused as outside:
        key = _at_other_sizes(model, state, call, key, outside)
        captured = state.graphs[key]
        tensors = captured.inputs(call)
    small = captured.dims.small(tensors)
    if small and not _same_when_small(model, state, call, key, tensors):
        key = _captured_as_given(model, state, call, key, small)
        captured = state.graphs[key]
        tensors = captured.inputs(call)
        captured.check(tensors)
    return key, captured, tensors


def _key(model: Any, state: Hosting, call: Call) -> SignatureKey:
    return call.key((*setting(model), *changed_config(model, state.config)))


_NO_GRAPH = "this call has no graph yet: make it by fast.prepare(...) or one call before compiling"


@torch.compiler.disable(reason=_NO_GRAPH)
def _captured(model: Any, state: Hosting, call: Call, key: SignatureKey) -> Captured:
    with TURNS.alone():
        if key in state.graphs:  # another thread was first
            return state.graphs[key]
        if state.frozen:
            found, fits = said_frozen(key, tuple(state.graphs))
            raise Refused(found, where="frozen", fits=fits)
        if len(state.graphs) >= state.limit:
            found, fits = said_limit(key, tuple(state.graphs), state.limit)
            raise Refused(found, fits=fits)
        with in_their_places(model, state.leaves, state.hooks):
            view = original(model)
            with same_statistics(view):
                captured = state.program_for(view, call)
            for path, layer in captured.replaced.items():
                model.set_submodule(path, layer.train(model.get_submodule(path).training))
            state.leaves = {**state.leaves, **captured.replaced}
            captured.called = restore_leaves(captured.graph, view)
        mount(captured, model)
        state.graphs[key] = captured
    log.log(logging.INFO if len(state.graphs) == 1 else logging.WARNING, "captured new signature %s", key)
    for path in silent_hooks(model, captured.called) if len(state.graphs) == 1 else ():
        log.warning("%s: its hooks do not fire; what they do to tensors was traced", path)
    for note in captured.notes:
        log.info("%s", note)
    return captured


def _at_other_sizes(model: Any, state: Hosting, call: Call, key: SignatureKey, outside: Refused) -> SignatureKey:
    """A call outside the sizes of its graph: another graph's call, a graph of its own where the model takes it."""
    for other, made in state.graphs.items():
        if other.is_at_sizes_of(key) and made.fits(call):
            return other
    captured = state.graphs[key]
    places = captured.dims.apart(captured.inputs(call))
    apart = key.at(places)
    if apart in state.graphs:
        raise outside
    try:
        with TURNS.alone():
            must_run(original(model), call.args, call.kwargs)
    except Refused as own:
        raise Refused(outside.found, where=outside.where, fits=f"{outside.fits}; {own.found}") from None
    token = AS_GIVEN.set(AS_GIVEN.get() or any(size < 2 for _, size in places))  # a trace knows no size of 0 or 1
    try:
        _captured(model, state, call, apart).check(state.graphs[apart].inputs(call))
    except Uncapturable:
        raise outside from None
    finally:
        AS_GIVEN.reset(token)
    return apart


def _same_when_small(model: Any, state: Hosting, call: Call, key: SignatureKey, tensors: tuple[Tensor, ...]) -> bool:
    """Whether the model computes the same at sizes of 0 and 1, which no trace at larger ones can know; asked once."""
    same = at_hand(state.small, (key, state.graphs[key].dims.small(tensors)))
    return _computes_the_same(model, state, call, key, tensors) if same is None else same


@torch.compiler.disable(reason=_NO_GRAPH)
def _computes_the_same(model: Any, state: Hosting, call: Call, key: SignatureKey, tensors: tuple[Tensor, ...]) -> bool:
    captured = state.graphs[key]
    plain, sizes, opened = as_captured(captured, call, tensors)
    with TURNS.alone(), in_their_places(model, state.leaves, state.hooks):
        same = operations_at(original(model), plain, Attempt(sizes, opened)) == captured.operations
    state.small[key, captured.dims.small(tensors)] = same
    return same


def _captured_as_given(
    model: Any, state: Hosting, call: Call, key: SignatureKey, small: tuple[tuple[str, int], ...]
) -> SignatureKey:
    """Where it computes something else, such sizes are a signature of their own."""
    apart = key.at(small)
    if apart not in state.graphs:
        token = AS_GIVEN.set(True)
        try:
            _captured(model, state, call, apart)
        finally:
            AS_GIVEN.reset(token)
    return apart


def _keep_extras(model: Any, state: Hosting, captured: Captured, flat: tuple[Any, ...]) -> None:
    """Named losses and traces of this call, and new values of buffers, which are written in train() only."""
    state.losses, buffers, state.traces = captured.extras(flat)
    if model.training:
        for name, value in buffers.items():
            path, _, last = name.rpartition(".")
            model.get_submodule(path)._buffers[last].copy_(value.detach())
