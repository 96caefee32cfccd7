"""Values taken apart into flat tensors and a layout, and put together again: what goes into a call and comes out of it.

Tuples, lists, dicts, dataclasses, Hugging Face outputs and caches are containers; everything else that is no tensor is
a constant. A cache that is still empty has the layout of a filled one, its tensors missing.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from .refusal import Refused

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, enum.Enum, type, torch.Size)
MUTABLE = ("object", "mapping", "items")  # kinds of layouts whose values a call may change
_CACHES = ("Cache", "CacheLayerMixin", "LinearAttentionCacheLayerMixin")
_GROWING = (
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "RingLayer",
    "StateLayer",
)  # layers that a graph takes and gives back
_FILLED_IN = (
    "is_initialized",
    "dtype",
    "device",
    "rows",
    "stands_for",
)  # attributes of a cache layer that its tensors say again


@dataclass(frozen=True)
class Layout:
    """How a value is made: "tensor", "value" (a constant), "items", "mapping", "fields", "object", "argument"."""

    kind: str
    type: Any = None
    names: tuple[Any, ...] = ()
    parts: tuple[Layout, ...] = ()
    value: Any = None

    def __str__(self) -> str:
        if self.kind == "tensor":
            return "tensor" if self.value is None else str(self.value)
        if self.kind in ("value", "argument"):
            return _text(self.value)
        if self.kind == "items":
            inside = ", ".join(map(str, self.parts))
            return f"[{inside}]" if self.type is list else f"({inside}{',' if len(self.parts) == 1 else ''})"
        if self.kind == "object":
            return f"{self.type.__name__}[{self.count} tensors]"
        inside = ", ".join(f"{n}: {p}" for n, p in zip(self.names, self.parts))
        return f"{{{inside}}}" if self.kind == "mapping" else f"{self.type.__name__}({inside})"

    @property
    def count(self) -> int:
        """How many tensors stand in it."""
        return int(self.kind == "tensor") + sum(p.count for p in self.parts)


@dataclass(frozen=True)
class Leaf:
    """One tensor of a value, or the place of one that is missing, and its path: `past_key_values.layers.0.keys`."""

    path: str
    tensor: Tensor | None
    cached: bool = False  # part of a cache: it grows from call to call, and may still be missing
    whole: bool = False  # a state: it has its full size, zeros, before anything came


def _text(value: Any) -> str:
    if isinstance(value, PLAIN):
        return value.__name__ if isinstance(value, type) else repr(value)
    return f"<{type(value).__name__}>"


def take_apart(value: Any, path: str, known: Mapping[int, str] | None = None) -> tuple[list[Leaf], Layout]:
    """The tensors of a value in order, and its layout; `known` objects (by id) are named instead of taken apart."""
    leaves: list[Leaf] = []
    return leaves, _apart(value, path, leaves, known or {})


def copied(value: Any) -> Any:
    """A deep copy; tensors that torch would not copy, since gradients reach them, without their history."""
    held = (leaf.tensor for leaf in take_apart(value, "")[0] if isinstance(leaf.tensor, Tensor))
    return copy.deepcopy(value, {id(t): t.detach().clone() for t in held if not t.is_leaf})


def _apart(value: Any, path: str, leaves: list[Leaf], known: Mapping[int, str]) -> Layout:
    if known and id(value) in known and not isinstance(value, PLAIN):  # torch.compile would guard on every id asked
        return Layout("argument", value=known[id(value)])
    if isinstance(value, Tensor | torch.SymInt | torch.SymFloat | torch.SymBool):
        leaves.append(Leaf(path, value))  # type: ignore[arg-type]
        return Layout("tensor")
    if isinstance(value, PLAIN):
        return Layout("value", value=value)
    if is_cache(value):
        return _apart_object(value, path, leaves, known)
    if is_dataclass(value) and not isinstance(value, type):
        given = {f.name: getattr(value, f.name) for f in fields(value)}
        if isinstance(value, Mapping):  # a Hugging Face ModelOutput: what is None is not there, what came later is last
            given = dict(value) | {n: v for n, v in given.items() if v is not None}
        return _named("fields", value, given, path, leaves, known)
    if isinstance(value, Mapping):
        return _named("mapping", value, dict(value), path, leaves, known)
    if isinstance(value, tuple | list):
        parts = tuple(_apart(v, f"{path}.{k}" if path else str(k), leaves, known) for k, v in enumerate(value))
        return Layout("items", type(value), parts=parts)
    try:
        hash(value)
    except TypeError:
        fits = "tensors, numbers, text, lists, tuples, dicts and dataclasses of them"
        raise Refused(f"a {type(value).__name__}", where=path, fits=fits) from None
    return Layout("value", value=value)


def _named(
    kind: str, value: Any, given: Mapping[Any, Any], path: str, leaves: list[Leaf], known: Mapping[int, str]
) -> Layout:
    parts = tuple(_apart(v, f"{path}.{n}" if path else str(n), leaves, known) for n, v in given.items())
    return Layout(kind, type(value), tuple(given), parts)


def put_together(layout: Layout, leaves: Sequence[Any], known: Mapping[str, Any] | None = None) -> Any:
    """The value again, around other tensors; arguments that were named are looked up in `known`."""
    remaining = iter(leaves)
    return _together(layout, lambda: next(remaining), known or {})


def _together(layout: Layout, take: Callable[[], Any], known: Mapping[str, Any]) -> Any:
    if layout.kind == "tensor":
        return take()
    if layout.kind == "value":
        return layout.value
    if layout.kind == "argument":
        return known[layout.value]
    parts = [_together(p, take, known) for p in layout.parts]
    if layout.kind == "items":
        return layout.type(*parts) if hasattr(layout.type, "_fields") else layout.type(parts)
    named = dict(zip(layout.names, parts))
    if layout.kind == "object":
        return _object(layout.type, named)
    if layout.kind == "fields":
        return _dataclass(layout.type, named)
    return named if layout.type is dict else layout.type(named)


def _dataclass(made_of: type, named: dict[str, Any]) -> Any:
    """What was put into a Hugging Face output after it was made comes after what it was made of."""
    own = [f.name for f in fields(made_of) if f.name in named]
    value = made_of(**{n: named[n] for n in own})
    if own != list(named):
        for name, part in named.items():
            value[name] = part
            value.move_to_end(name)
    return value


# --- caches -----------------------------------------------------------------------------------------------------------


def is_cache(value: Any) -> bool:
    """A Hugging Face cache, or one of its layers."""
    bases = type(value).__mro__
    return any(b.__name__ in _CACHES and b.__module__ == "transformers.cache_utils" for b in bases)


def lay_out_caches(model: Any, values: Iterable[Any]) -> None:
    """Give caches that make their layers at the first update those layers now, so that every call finds them.

    Layers that would forget what left a sliding window keep everything instead, while they are empty: the graph's masks
    say the window again, and one graph serves every length.
    """
    for value in values:
        made_of = getattr(value, "layer_class_to_replicate", None) if is_cache(value) else None
        if made_of is not None and not value.layers and hasattr(model, "config"):
            config = model.config.get_text_config(decoder=True)
            value.layers.extend(made_of() for _ in range(config.num_hidden_layers))
        elif is_cache(value) and hasattr(value, "self_attention_cache"):
            lay_out_caches(model, (value.self_attention_cache, value.cross_attention_cache))
        elif is_cache(value) and any(_forgets(layer) for layer in getattr(value, "layers", ())):
            whole = next(b for b in type(next(filter(_forgets, value.layers))).__mro__ if b.__name__ == "DynamicLayer")
            value.layers[:] = [whole() if _forgets(layer) else layer for layer in value.layers]


def _is_layer_type(made_of: type) -> bool:
    return any(base.__name__ in _CACHES[1:] for base in made_of.__mro__)


def _forgets(layer: Any) -> bool:
    return type(layer).__name__ == "DynamicSlidingWindowLayer" and not layer.is_initialized


def is_layer(value: Any) -> bool:
    return is_cache(value) and not hasattr(value, "layers") and not hasattr(value, "self_attention_cache")


def _apart_object(value: Any, path: str, leaves: list[Leaf], known: Mapping[int, str]) -> Layout:
    given = dict(vars(value))
    if not is_layer(value):
        return _named("object", value, given, path, leaves, known)
    if type(value).__name__ not in _GROWING:  # a result: as an argument it is refused
        return _named("object", value, given, path, leaves, known)
    states = [given.pop("keys", None), given.pop("values", None)]
    names, parts = [], []
    for name, state in zip(("keys", "values"), states):
        found = state if state is not None and state.numel() else None
        leaves.append(Leaf(f"{path}.{name}", found, cached=True, whole=getattr(value, "is_state", False)))
        names.append(name)
        parts.append(Layout("tensor"))
    for name, part in given.items():
        if name == "cumulative_length":  # a number that grows with every call: the size of an empty tensor says it
            leaves.append(Leaf(f"{path}.{name}", torch.empty(part, 0), cached=True))
            names.append(name)
            parts.append(Layout("tensor"))
        elif name not in _FILLED_IN:
            names.append(name)
            parts.append(_apart(part, f"{path}.{name}", leaves, known))
    return Layout("object", type(value), tuple(names), tuple(parts))


def _object(made_of: type, named: dict[str, Any]) -> Any:
    value: Any = object.__new__(made_of)
    value.__dict__.update(named)
    if "keys" in named and "values" in named and is_cache(value):
        keys = named["keys"]
        if keys is None:  # a layer that nothing was written to
            value.__dict__["is_initialized"] = False
            return value
        value.__dict__ |= {"is_initialized": True, "dtype": keys.dtype, "device": keys.device}
        if "cumulative_length" in named:
            value.__dict__["cumulative_length"] = named["cumulative_length"].shape[0]
    return value


def refuse_other_states(layout: Layout, path: str) -> None:
    """A cache as an argument holds keys and values that grow; states of another kind a call may only give."""
    if layout.kind == "object" and _is_layer_type(layout.type) and layout.type.__name__ not in _GROWING:
        fits = "DynamicCache, whose layers grow by cat; else use_cache=False, also in generate"
        raise Refused(f"a cache layer {layout.type.__name__}", where=path, fits=fits)
    for k, part in enumerate(layout.parts):
        refuse_other_states(part, f"{path}.{layout.names[k] if layout.names else k}")


def absorb(old: Any, new: Any) -> None:
    """Make a mutable container what it became during the call: a cache grows, a dict or list is refilled."""
    if _still_empty(old, new):
        return
    if is_cache(old):
        for name, part in vars(new).items():
            before = vars(old).get(name)
            if isinstance(before, list) and len(before) == len(part):
                for one, other in zip(before, part):
                    absorb(one, other)
            elif is_cache(before):
                absorb(before, part)
            else:
                setattr(old, name, part)
    elif isinstance(old, dict):
        old.clear()
        old.update(new)
    elif isinstance(old, list):
        old[:] = new


def _still_empty(old: Any, new: Any) -> bool:
    """A layer of a cache that no key was written to before the call or in it."""
    if not is_cache(old) or not is_layer(old) or vars(old).get("keys", 0) is not None:
        return False
    return vars(new).get("keys") is None or not new.keys.numel()
