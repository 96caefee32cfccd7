"""Whether two functions say the same on symbols, so that one that a caller writes anew at each call is read once.

They do where their code is the same and everything that it takes from outside: what it closes over, its defaults, its
globals. A key says all of that; there is none where something outside could change without being another object.
"""

from __future__ import annotations

import math
import operator
import types
from collections.abc import Hashable
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any

import torch

from .symbols import FUNCTIONS, Table, build

_PLAIN = (int, float, bool, str, bytes, type(None), torch.dtype)
_MODULES = (torch, torch.nn, torch.nn.functional, math, operator)
_FUNCTIONS = frozenset([*FUNCTIONS.values(), build])
_DEPTH = 8  # functions that functions call; one that calls itself comes to it


class _Unsaid(Exception):
    """Something that a key cannot hold."""


def sameness(function: Any, tables: list[Table]) -> Hashable | None:
    """A key that functions which say the same share; the tables that it looks up join the list, in a fixed order.

    >>> def within(reach): return lambda i, j: i - j < reach
    >>> sameness(within(4), []) == sameness(within(4), []) != sameness(within(5), [])
    True
    >>> sameness(within([4]), []) is None    # a list may hold something else at the next call
    True
    """
    try:
        return _of(function, tables, _DEPTH)
    except _Unsaid:
        return None


def _of(value: Any, tables: list[Table], depth: int) -> Hashable:
    if depth == 0:
        raise _Unsaid
    kind = type(value)
    if kind in _PLAIN:
        return kind, value, str(value) if kind is float else ""  # 0.0 is -0.0
    if kind is Table:
        return Table, _place(value, tables), value.tensor.ndim
    if kind in (types.FunctionType, types.BuiltinFunctionType) and value in _FUNCTIONS:
        return value
    if kind is types.FunctionType:
        return _of_function(value, tables, depth - 1)
    if kind is types.MethodType:
        return kind, _of(value.__func__, tables, depth - 1), _of(value.__self__, tables, depth - 1)
    if kind is tuple:
        return kind, *(_of(each, tables, depth - 1) for each in value)
    if kind is types.ModuleType and value in _MODULES:
        return value
    if is_dataclass(value) and kind.__dataclass_params__.frozen:
        own = vars(value)
        if own.keys() == {field.name for field in fields(value)}:
            return kind, *(_of(each, tables, depth - 1) for each in own.values())
    raise _Unsaid


def _place(one: Table, tables: list[Table]) -> int:
    for number, known in enumerate(tables):
        if known.tensor is one.tensor:
            return number
    tables.append(one)
    return len(tables) - 1


def _of_function(function: types.FunctionType, tables: list[Table], depth: int) -> Hashable:
    code = function.__code__
    if not _known(code):
        raise _Unsaid
    try:
        outside = [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError:  # one that is not filled yet
        raise _Unsaid from None
    given = function.__globals__
    outside += [given[name] for name in _names(code) if name in given]
    outside += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return code, *(_of(each, tables, depth) for each in outside)


@lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """The names of globals and attributes in a function and the functions within it."""
    inner = [name for each in code.co_consts if isinstance(each, types.CodeType) for name in _names(each)]
    return tuple(dict.fromkeys([*code.co_names, *inner]))


@lru_cache(maxsize=4096)
def _known(code: types.CodeType) -> bool:
    """Whether all that it may call of torch is a function of expressions: others may give another number each time."""
    for name in _names(code):
        found = getattr(torch, name, None) or getattr(torch.nn.functional, name, None)
        if callable(found) and name not in FUNCTIONS:
            return False
    return True
