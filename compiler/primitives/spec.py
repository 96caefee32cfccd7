"""The text that a primitive's op sees: canonical JSON of a frozen value, defaults left out: equal value, equal text."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, TypeVar

import torch

from ..refusal import Refused

S = TypeVar("S", bound="Spec")


@dataclass(frozen=True)
class Spec:
    """Base of all specs: a frozen dataclass of texts, numbers and tuples of them."""

    @property
    def text(self) -> str:
        if torch.compiler.is_compiling():
            return _written(self)
        try:
            return _kept(self)
        except TypeError:  # it holds a list
            return _written(self)

    @classmethod
    def of(cls: type[S], text: str) -> S:
        found: S = _parse(cls, text)  # type: ignore[arg-type]
        return found


@lru_cache(maxsize=4096)
def _kept(spec: Spec) -> str:
    return _written(spec)


def _written(value: Any) -> str:
    """JSON, in words that torch.compile can trace (it cannot trace json.dumps)."""
    if isinstance(value, Spec):
        own = type(value)  # a default is an attribute of the class
        names = sorted([f.name for f in fields(value)])
        given = {name: getattr(value, name) for name in names if getattr(value, name) != getattr(own, name, None)}
        return "{" + ",".join([f'"{key}":{_written(given[key])}' for key in given]) + "}"
    if isinstance(value, tuple | list):
        return "[" + ",".join([_written(v) for v in value]) + "]"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value)


@lru_cache(maxsize=4096)
def _parse(cls: Any, text: str) -> Any:
    try:
        given = json.loads(text)
        return cls(**{key: _frozen(value) for key, value in given.items()})
    except (TypeError, ValueError) as error:
        raise Refused(f"not a spec of {cls.__name__}: {text!r} ({error})") from None


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value
