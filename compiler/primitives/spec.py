"""The text that a primitive's op sees: canonical JSON of a frozen value, defaults left out: equal value, equal text."""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache
from typing import Any, TypeVar

from ..refusal import Refused

S = TypeVar("S", bound="Spec")


@dataclass(frozen=True)
class Spec:
    """Base of all specs: a frozen dataclass of texts, numbers and tuples of them."""

    @property
    def text(self) -> str:
        given = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if getattr(self, f.name) != f.default or f.default is MISSING
        }
        return json.dumps(given, sort_keys=True, separators=(",", ":"), default=_plain)

    @classmethod
    def of(cls: type[S], text: str) -> S:
        found: S = _parse(cls, text)  # type: ignore[arg-type]
        return found


def _plain(value: Any) -> Any:
    return {f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) != f.default}


@lru_cache(maxsize=4096)
def _parse(cls: Any, text: str) -> Any:
    try:
        given = json.loads(text)
        return cls(**{key: _frozen(value) for key, value in given.items()})
    except (TypeError, ValueError) as error:
        raise Refused(f"not a spec of {cls.__name__}: {text!r} ({error})") from None


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value
