"""The sizes a graph was captured for: static ones, symbols with their bounds, and the relations between them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from .refusal import Refused

_SIZE = re.compile(r"L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\]")
_AT = r"s[\1][\2]"
_ORDER = re.compile(r" (!=|<|>|<=|>=) ")  # relations that sizes of 0 and 1 break without the graph being wrong
Condition = Callable[..., Any]
_KNOWN: dict[str, Any] = {"math": math, "torch": torch, "min": min, "max": max, "__builtins__": {}}


@dataclass(frozen=True)
class Symbol:
    """One dynamic size: its name in the graph, its least and greatest value."""

    name: str
    least: int = 0
    most: int | None = None

    def __str__(self) -> str:
        return f"{self.name} in {self.least}..{'any' if self.most is None else self.most}"


@dataclass(frozen=True)
class Sizes:
    """For each tensor input and dimension a static size, a symbol's name or an expression of symbols."""

    inputs: tuple[str, ...]
    shapes: tuple[tuple[int | str, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    symbols: dict[str, Symbol] = field(default_factory=dict)
    guards: tuple[str, ...] = ()  # Python conditions on L['tensors'][k].size()[d]

    def __post_init__(self) -> None:
        """Conditions are compiled here, not when first asked: torch.compile cannot trace a property's lock."""
        self.__dict__.update(_derived=self._derivations(), _conditions=self._both())

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # compiled guards stay behind

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    def __str__(self) -> str:
        shown = [f"{n} ({', '.join(map(str, s))})" for n, s in zip(self.inputs, self.shapes)]
        return ", ".join(shown) + "".join(f"; {s}" for s in self.symbols.values())

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Raise Refused naming argument, dimension, both sizes and the captured range where a call is outside of it."""
        bound: dict[str, tuple[int, str]] = {}
        for name, shape, dtype, tensor in zip(self.inputs, self.shapes, self.dtypes, tensors, strict=True):
            if tensor.dtype is not dtype:
                raise Refused(f"dtype {tensor.dtype}", where=name, fits=f"captured with {dtype}")
            for dim, (wanted, size) in enumerate(zip(shape, tensor.shape, strict=True)):
                if isinstance(wanted, int):
                    if wanted != size:
                        raise Refused(f"dim {dim} is {size}", where=name, fits=f"captured with {wanted}, not dynamic")
                elif wanted in self.symbols:
                    self._symbol(self.symbols[wanted], int(size), f"{name} dim {dim}", bound)
        small = any(size < 2 for size, _ in bound.values())
        self._expressions(tensors, {s: size for s, (size, _) in bound.items()})
        self._relations([tuple(t.shape) for t in tensors], small)

    def small(self, tensors: Sequence[Tensor]) -> tuple[tuple[str, int], ...]:
        """Symbols that were at least 2 in the capture and are 0 or 1 here, by the first place they are read at."""
        found: dict[str, tuple[str, int]] = {}
        for name, shape, tensor in zip(self.inputs, self.shapes, tensors):
            for dim, (wanted, size) in enumerate(zip(shape, tensor.shape)):
                if size < 2 and isinstance(wanted, str) and wanted in self.symbols and self.symbols[wanted].least >= 2:
                    found.setdefault(wanted, (f"{name} dim {dim}", int(size)))
        return tuple(found.values())

    def apart(self, tensors: Sequence[Tensor]) -> tuple[tuple[str, int], ...]:
        """The sizes of a call outside of the range: static ones that differ, else all dynamic ones."""
        places = [
            (f"{name} dim {dim}", wanted, int(size))
            for name, shape, tensor in zip(self.inputs, self.shapes, tensors)
            for dim, (wanted, size) in enumerate(zip(shape, tensor.shape))
        ]
        static = tuple((place, size) for place, wanted, size in places if isinstance(wanted, int) and wanted != size)
        return static or tuple((place, size) for place, wanted, size in places if isinstance(wanted, str))

    @staticmethod
    def _symbol(symbol: Symbol, size: int, place: str, bound: dict[str, tuple[int, str]]) -> None:
        if symbol.name in bound and bound[symbol.name][0] != size:
            before, where = bound[symbol.name]
            raise Refused(f"{place} is {size}", where="sizes", fits=f"captured as equal to {where}, which is {before}")
        if (size < symbol.least and size > 1) or (symbol.most is not None and size > symbol.most):
            raise Refused(f"{place} is {size}", where="sizes", fits=f"captured for {symbol}")
        bound.setdefault(symbol.name, (size, place))

    def _expressions(self, tensors: Sequence[Tensor], values: dict[str, int]) -> None:
        for name, dim, text, used, derived in self.__dict__["_derived"]:
            if any(s not in values for s in used):
                continue
            expected, size = derived(*(values[s] for s in used)), tensors[self.inputs.index(name)].shape[dim]
            if expected != size:
                fits = f"captured as {text}, which is {expected} here"
                raise Refused(f"{name} dim {dim} is {size}", where="sizes", fits=fits)

    def _derivations(self) -> list[tuple[str, int, str, tuple[str, ...], Condition]]:
        found = []
        for name, shape in zip(self.inputs, self.shapes):
            for dim, wanted in enumerate(shape):
                if isinstance(wanted, str) and wanted not in self.symbols:
                    used = tuple(s for s in compile(wanted, name, "eval").co_names if s in self.symbols)
                    found.append((name, dim, wanted, used, _function(", ".join(used), wanted)))
        return found

    def _relations(self, sizes: list[tuple[int, ...]], small: bool) -> None:
        everything, equalities = self.__dict__["_conditions"]
        if (equalities if small else everything)(sizes):
            return
        for guard in self.guards:
            if not (small and _ORDER.search(guard)) and not _condition(guard)(sizes):
                raise Refused(self._found(guard, sizes), where="sizes", fits=f"captured where {self._said(guard)}")

    def _both(self) -> tuple[Condition, Condition]:
        equal = [g for g in self.guards if not _ORDER.search(g)]
        return _condition(*self.guards), _condition(*equal)

    def _said(self, guard: str) -> str:
        return _SIZE.sub(lambda m: f"{self.inputs[int(m[1])]}.shape[{m[2]}]", guard)

    def _found(self, guard: str, sizes: list[tuple[int, ...]]) -> str:
        used = sorted({(int(k), int(d)) for k, d in _SIZE.findall(guard)})
        return ", ".join(f"{self.inputs[k]} dim {d} is {sizes[k][d]}" for k, d in used)


def _condition(*guards: str) -> Condition:
    """All of these guards as a function of the inputs' sizes."""
    return _function("s", " and ".join(f"({_SIZE.sub(_AT, guard)})" for guard in guards) or "True")


def _function(arguments: str, expression: str) -> Condition:
    """A function, not a code object to be evaluated: torch.compile traces through the one and breaks at the other."""
    function: Condition = eval(f"lambda {arguments}: {expression}", _KNOWN)
    return function
