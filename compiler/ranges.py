"""The sizes a graph was captured for: static ones, symbols with their bounds, and the relations between them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from .refusal import Refused

_SIZE = re.compile(r"L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\]")
_ORDER = re.compile(r" (!=|<|>|<=|>=) ")  # relations that sizes of 0 and 1 break without the graph being wrong
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

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # compiled guards stay behind

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
        for name, dim, text, code in self._derived:
            if any(s not in values for s in code.co_names if s in self.symbols):
                continue
            expected, size = eval(code, _KNOWN, values), tensors[self.inputs.index(name)].shape[dim]
            if expected != size:
                fits = f"captured as {text}, which is {expected} here"
                raise Refused(f"{name} dim {dim} is {size}", where="sizes", fits=fits)

    @cached_property
    def _derived(self) -> list[tuple[str, int, str, CodeType]]:
        found = []
        for name, shape in zip(self.inputs, self.shapes):
            for dim, wanted in enumerate(shape):
                if isinstance(wanted, str) and wanted not in self.symbols:
                    found.append((name, dim, wanted, compile(wanted, name, "eval")))
        return found

    def _relations(self, sizes: list[tuple[int, ...]], small: bool) -> None:
        everything, equalities = self._compiled
        if eval(equalities if small else everything, _KNOWN, {"s": sizes}):
            return
        for guard in self.guards:
            if not (small and _ORDER.search(guard)) and not eval(_code(guard), _KNOWN, {"s": sizes}):
                raise Refused(self._found(guard, sizes), where="sizes", fits=f"captured where {self._said(guard)}")

    @cached_property
    def _compiled(self) -> tuple[CodeType, CodeType]:
        equal = [g for g in self.guards if not _ORDER.search(g)]
        return _code(" and ".join(f"({g})" for g in self.guards) or "True"), _code(
            " and ".join(f"({g})" for g in equal) or "True"
        )

    def _said(self, guard: str) -> str:
        return _SIZE.sub(lambda m: f"{self.inputs[int(m[1])]}.shape[{m[2]}]", guard)

    def _found(self, guard: str, sizes: list[tuple[int, ...]]) -> str:
        used = sorted({(int(k), int(d)) for k, d in _SIZE.findall(guard)})
        return ", ".join(f"{self.inputs[k]} dim {d} is {sizes[k][d]}" for k, d in used)


def _code(guard: str) -> CodeType:
    return compile(_SIZE.sub(r"s[\1][\2]", guard), "guard", "eval")
