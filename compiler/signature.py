"""One call of a model, normalised against its forward: arguments given, their tensors flat, the rest constant."""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from .containers import Layout, Leaf, put_together, refuse_other_states, take_apart
from .refusal import Refused

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)


@dataclass(frozen=True)
class SignatureKey:
    """What makes two calls need one graph: arguments given, ranks, dtypes, devices, constants, mode. Never sizes."""

    arguments: tuple[tuple[str, Layout], ...]
    tensors: tuple[str, ...]  # "int64 2d" of each tensor, in order
    together: tuple[bool, ...]  # which tensors have the first one's batch
    setting: tuple[str, ...] = ()  # "train", weights' dtype and device, config values changed since hosting

    def at(self, places: Iterable[tuple[str, int]]) -> SignatureKey:
        """The same calls where these places have these sizes, which get a graph of their own."""
        return replace(self, setting=(*self.setting, *(f"{place} = {size}" for place, size in places)))

    def is_at_sizes_of(self, key: SignatureKey) -> bool:
        """Whether these are calls of `key` at certain sizes."""
        given = len(key.setting)
        return self != key and self.setting[:given] == key.setting and replace(self, setting=key.setting) == key

    def __str__(self) -> str:
        remaining = iter(self.tensors)
        texts = []
        for name, layout in self.arguments:
            given = [next(remaining) for _ in range(layout.count)]
            if layout.kind == "tensor":
                texts.append(f"{name}: {given[0]}")
            elif layout.kind == "value":
                texts.append(f"{name}={layout}")
            else:
                texts.append(f"{name}: {layout}")
        return f"({', '.join(texts)}) {' '.join(self.setting)}".rstrip()


@dataclass(frozen=True, eq=False)
class Call:
    """One call: its arguments by name without those that equal their default, its tensors flat.

    >>> import inspect, torch
    >>> def forward(x, mask=None, *, scale=1.0): ...
    >>> call = Call.of(inspect.signature(forward), (torch.zeros(2, 3),), {"mask": None, "scale": 2.0})
    >>> print(call.key())
    (x: float32 2d, scale=2.0)
    """

    signature: inspect.Signature
    layouts: tuple[tuple[str, Layout], ...]
    leaves: tuple[Leaf, ...]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)  # what was given, by argument name

    @staticmethod
    def of(forward_signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Call:
        args, kwargs = tuple(args), dict(kwargs or {})
        values = _given(forward_signature, args, kwargs)
        leaves: list[Leaf] = []
        layouts = []
        for name, value in values.items():
            found, layout = take_apart(value, name)
            refuse_other_states(layout, name)
            leaves += found
            layouts.append((name, layout))
        return Call(forward_signature, tuple(layouts), tuple(leaves), args, kwargs, values)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Flat, in order; None where a cache is still empty."""
        return tuple(leaf.tensor for leaf in self.leaves)

    def key(self, setting: tuple[str, ...] = ()) -> SignatureKey:
        sized = [t.shape[0] if t is not None and t.ndim else None for t in self.tensors]
        first = next((s for s in sized if s is not None), None)
        cached = [leaf.cached for leaf in self.leaves]
        together = tuple(c or s == first for s, c in zip(sized, cached))
        texts = tuple("cache" if c else _describe(t) for t, c in zip(self.tensors, cached))
        return SignatureKey(self.layouts, texts, together, setting)


def forward_signature(model: nn.Module) -> inspect.Signature:
    """The signature of a model's forward, without self."""
    bound = model.forward
    function = getattr(bound, "__func__", None)
    return inspect.signature(bound) if function is None else _without_self(function)


@functools.lru_cache(maxsize=256)
def _without_self(function: Callable[..., Any]) -> inspect.Signature:
    """Read once for each function: it is asked for at every call."""
    whole = inspect.signature(function)
    return whole.replace(parameters=list(whole.parameters.values())[1:])


def rebuild(
    signature: inspect.Signature, layouts: Sequence[tuple[str, Layout]], tensors: Sequence[Any]
) -> tuple[dict[str, Any], tuple[Any, ...], dict[str, Any]]:
    """A call made again around other tensors: its values by name, and the (args, kwargs) that say them."""
    values, start = {}, 0
    for name, layout in layouts:
        values[name] = put_together(layout, tensors[start : start + layout.count])
        start += layout.count
    bound = inspect.BoundArguments(signature, OrderedDict())
    extra = _variable(signature, inspect.Parameter.VAR_KEYWORD)
    named = {n: v for n, v in values.items() if n in signature.parameters and n != extra}
    bound.arguments.update({n: named[n] for n in signature.parameters if n in named})
    if any(signature.parameters[n].kind in _POSITIONAL for n in named):
        bound.apply_defaults()
    args, kwargs = bound.args, dict(bound.kwargs)
    return values, args, kwargs | {n: v for n, v in values.items() if n not in named}


def _given(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise Refused(str(error), where="this call", fits=f"forward{signature}") from None
    values = {}
    extra = _variable(signature, inspect.Parameter.VAR_KEYWORD)
    for name, value in bound.arguments.items():
        if name == extra:
            values.update({n: v for n, v in value.items() if v is not None})
        elif not _is_default(value, signature.parameters[name].default):
            values[name] = value
    return values


def _variable(signature: inspect.Signature, kind: Any) -> str | None:
    return next((n for n, p in signature.parameters.items() if p.kind is kind), None)


def _is_default(value: Any, default: Any) -> bool:
    if value is default:
        return True
    return not isinstance(value, Tensor) and type(value) is type(default) and bool(value == default)


def _describe(tensor: Any) -> str:
    if not isinstance(tensor, Tensor):
        return "missing" if tensor is None else type(tensor).__name__
    device = "" if tensor.device.type == "cpu" else f" {tensor.device.type}"
    return f"{str(tensor.dtype).removeprefix('torch.')} {tensor.ndim}d{device}"
