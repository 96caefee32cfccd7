"""What a knob may hold: a dataclass field's annotation read once, for checks, messages and for JSON Schema.

Understood: int, float, bool, str, None, Any, Literal[...], tuple[T, ...], tuple[S, T], list[T], dict[str, T], Mapping,
unions by `|` and Optional. Whatever else a field says is left to the mechanism itself.
"""

from __future__ import annotations

import ast
import math
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

LARGEST = 2**63 - 1  # an int that a tensor can hold


@dataclass(frozen=True)
class Table:
    """A mapping that can be hashed; `items` in order of name."""

    items: tuple[tuple[str, Any], ...]


def freeze(value: Any) -> Any:
    """Plain data, hashable: lists become tuples, mappings tables."""
    if isinstance(value, Mapping):
        return Table(tuple(sorted((str(key), freeze(item)) for key, item in value.items())))
    return tuple(freeze(item) for item in value) if isinstance(value, list | tuple) else value


def thaw(value: Any) -> Any:
    """The plain data that `freeze` was given."""
    if isinstance(value, Table):
        return {key: thaw(item) for key, item in value.items}
    return [thaw(item) for item in value] if isinstance(value, tuple) else value


class Misfit(Exception):
    """A value that a type does not admit."""


class KnobType(ABC):
    """One type: `admit` gives the canonical frozen value or raises Misfit; `says` and `schema` describe it."""

    @property
    @abstractmethod
    def says(self) -> str: ...

    @abstractmethod
    def admit(self, value: Any) -> Any: ...

    @abstractmethod
    def schema(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Plain(KnobType):
    """int, float, bool, str or None. An int is a float too; a float without a fraction is an int (`steps: 1e4`)."""

    name: str

    _SCHEMA: ClassVar = {"int": "integer", "float": "number", "bool": "boolean", "str": "string", "None": "null"}
    _SAYS: ClassVar = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "str": "a text",
        "None": "null",
    }

    @property
    def says(self) -> str:
        return self._SAYS[self.name]

    def admit(self, value: Any) -> Any:
        if self.name == "None" and value is None:
            return None
        if self.name in ("bool", "str") and type(value).__name__ == self.name:
            return value
        if self.name == "int" and _is_number(value) and abs(value) <= LARGEST and value == int(value):
            return int(value)
        if self.name == "float" and _is_number(value):
            return _float(value)
        raise Misfit

    def schema(self) -> dict[str, Any]:
        return {"type": self._SCHEMA[self.name]}


@dataclass(frozen=True)
class OneOf(KnobType):
    """One of some literal values."""

    values: tuple[Any, ...]

    @property
    def says(self) -> str:
        return "one of " + ", ".join(map(str, self.values))

    def admit(self, value: Any) -> Any:
        for known in self.values:
            if value == known and isinstance(value, bool) == isinstance(known, bool):
                return known
        raise Misfit

    def schema(self) -> dict[str, Any]:
        return {"enum": list(self.values)}


@dataclass(frozen=True)
class Union(KnobType):
    """The first of several types that admits a value; one that keeps it as it is comes before one that converts it."""

    options: tuple[KnobType, ...]

    @property
    def says(self) -> str:
        return " or ".join(option.says for option in self.options)

    def admit(self, value: Any) -> Any:
        found = []
        for option in self.options:
            try:
                found.append(option.admit(value))
            except Misfit:
                continue
        if not found:
            raise Misfit
        return next((one for one in found if type(one) is type(value)), found[0])

    def schema(self) -> dict[str, Any]:
        return {"anyOf": [option.schema() for option in self.options]}


@dataclass(frozen=True)
class Several(KnobType):
    """A list: of one type and any length, or of the given types in order."""

    of: tuple[KnobType, ...]
    any_length: bool

    @property
    def says(self) -> str:
        if self.any_length:
            return f"a list, each {self.of[0].says}"
        return f"a list of {len(self.of)} ({', '.join(one.says for one in self.of)})"

    def admit(self, value: Any) -> Any:
        if not isinstance(value, list | tuple) or not (self.any_length or len(value) == len(self.of)):
            raise Misfit
        each = self.of * len(value) if self.any_length else self.of
        return tuple(kind.admit(item) for kind, item in zip(each, value))

    def schema(self) -> dict[str, Any]:
        if self.any_length:
            return {"type": "array", "items": self.of[0].schema()}
        return {"type": "array", "prefixItems": [one.schema() for one in self.of], **_length(len(self.of))}


@dataclass(frozen=True)
class Named(KnobType):
    """A mapping from texts to one type."""

    of: KnobType

    @property
    def says(self) -> str:
        return f"a mapping, each value {self.of.says}"

    def admit(self, value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise Misfit
        return Table(tuple(sorted((str(key), self.of.admit(item)) for key, item in value.items())))

    def schema(self) -> dict[str, Any]:
        return {"type": "object", "additionalProperties": self.of.schema()}


@dataclass(frozen=True)
class Anything(KnobType):
    """Plain data of any shape: the mechanism judges it."""

    says = "any plain value"

    def admit(self, value: Any) -> Any:
        return freeze(value)

    def schema(self) -> dict[str, Any]:
        return {}


@lru_cache
def knob_type(annotation: Any) -> KnobType:
    """The type that an annotation names, given as text or as the object.

    >>> knob_type("tuple[int, ...] | None").says
    'a list, each a whole number or null'
    >>> knob_type("Literal['mean', 'max']").admit("max")
    'max'
    """
    text = annotation if isinstance(annotation, str) else _spelled(annotation)
    try:
        return _read(ast.parse(text, mode="eval").body)
    except SyntaxError:
        return Anything()


def _read(tree: ast.expr) -> KnobType:
    if isinstance(tree, ast.Constant) and tree.value is None:
        return Plain("None")
    if isinstance(tree, ast.Constant) and isinstance(tree.value, str):  # a quoted annotation
        return knob_type(tree.value)
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.BitOr):
        return _union([_read(tree.left), _read(tree.right)])
    if isinstance(tree, ast.Subscript):
        return _read_subscript(_name(tree.value), tree.slice)
    name = _name(tree)
    if name in ("int", "float", "bool", "str", "None"):
        return Plain(name)
    return _BARE.get(name, Anything)()


def _read_subscript(name: str, inner: ast.expr) -> KnobType:
    arguments = list(inner.elts) if isinstance(inner, ast.Tuple) else [inner]
    if name == "Literal":
        values = [ast.literal_eval(argument) for argument in arguments]
        return OneOf(tuple(values))
    kinds = [_read(one) for one in arguments if not (isinstance(one, ast.Constant) and one.value is ...)]
    if name in ("Optional", "Union"):
        return _union(kinds + ([Plain("None")] if name == "Optional" else []))
    if name in ("tuple", "Tuple"):
        return Several(tuple(kinds), any_length=len(kinds) < len(arguments))
    if name in ("list", "List", "Sequence"):
        return Several((kinds[0],), any_length=True)
    if name in ("dict", "Dict", "Mapping"):
        return Named(kinds[-1])
    return kinds[0] if name in ("Annotated", "Final") else Anything()


_BARE: dict[str, Callable[[], KnobType]] = {
    "tuple": lambda: Several((Anything(),), any_length=True),
    "list": lambda: Several((Anything(),), any_length=True),
    "dict": lambda: Named(Anything()),
    "Mapping": lambda: Named(Anything()),
}


def _union(kinds: list[KnobType]) -> KnobType:
    flat = [one for kind in kinds for one in (kind.options if isinstance(kind, Union) else (kind,))]
    return Anything() if Anything() in flat else Union(tuple(flat))


def _name(tree: ast.expr) -> str:
    return tree.attr if isinstance(tree, ast.Attribute) else tree.id if isinstance(tree, ast.Name) else ""


def _spelled(annotation: Any) -> str:
    """The text of an annotation object: `int`, `tuple[int, ...]`, `int | None`, `Literal['a']`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return "None" if annotation is type(None) else annotation.__name__
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " | ".join(map(_spelled, typing.get_args(annotation)))
    return str(annotation)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _float(value: float) -> float:
    try:
        found = float(value)
    except OverflowError:
        raise Misfit from None
    if not math.isfinite(found):  # what it is multiplied with would be no number
        raise Misfit
    return found


def _length(count: int) -> dict[str, Any]:
    return {"minItems": count, "maxItems": count}
