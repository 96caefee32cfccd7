"""The tensors that a spec's texts look up, in order of first use, and the functions that look them up, read to text.

A caller writes most functions anew at each call: those that say the same are read once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..symbol_read import read
from ..symbol_same import sameness
from ..symbols import Expr, Table, build

Function = Callable[..., Any]  # run on symbols; its parameters are asked for by name
_MOST_READ = 4096  # functions whose texts are kept
_READ: dict[Hashable, tuple[str, list[int]]] = {}  # what functions say, and which of the tables that they name are new


class Tables:
    """The tensors that a spec's texts look up, named t0, t1, ... in order of first use."""

    def __init__(self, tensors: Sequence[Tensor] = ()) -> None:
        self.tensors: list[Tensor] = list(tensors)

    def name_of(self, tensor: Tensor | None) -> str:
        if tensor is None:
            return ""
        for index, known in enumerate(self.tensors):
            if known is tensor:
                return f"t{index}"
        self.tensors.append(tensor)
        return f"t{len(self.tensors) - 1}"

    def settle(self, e: Expr) -> Expr:
        """The expression with its live tables replaced by their names here."""
        if e.op == "lookup":
            which = self.name_of(e.args[0].tensor) if isinstance(e.args[0], Table) else e.args[0]
            return Expr("lookup", (which, *(self.settle(a) for a in e.args[1:])))
        if e.op in ("name", "const"):
            return e
        return build(e.op, *(self.settle(a) for a in e.args))

    def text(self, function: Function | None, known: Mapping[str, Expr], what: str, beside: Expr | None = None) -> str:
        """What a function says, in names of these tables, and what holds beside it."""
        if function is None:
            return "" if beside is None else beside.text
        live: list[Table] = []
        same = None if torch.compiler.is_compiling() else sameness(function, live)
        if same is None:
            return self._read(function, known, what, beside)
        had = len(self.tensors)
        said = same, _around(known, beside), had, tuple([self._place(each.tensor) for each in live])
        if said in _READ:
            text, new = _READ[said]
            self.tensors += [live[n].tensor for n in new]
            return text
        text = self._read(function, known, what, beside)
        _keep(said, text, self.tensors[had:], live)
        return text

    def _read(self, function: Function, known: Mapping[str, Expr], what: str, beside: Expr | None) -> str:
        found = read(function, known, what=what)
        return self.settle(found if beside is None else found & beside).text

    def _place(self, tensor: Tensor) -> int:
        return next((n for n, known in enumerate(self.tensors) if known is tensor), -1)


def _around(known: Mapping[str, Expr], beside: Expr | None) -> Hashable:
    """What a function's text depends on beside the function."""
    return tuple([(n, e.text) for n, e in known.items()]), None if beside is None else beside.text


def _keep(said: Hashable, text: str, added: Sequence[Tensor], live: Sequence[Table]) -> None:
    """Remember a text, unless its function made a table for itself: that of the next call would be another one."""
    new = [n for tensor in added for n, each in enumerate(live) if each.tensor is tensor]
    if len(new) != len(added):
        return
    if len(_READ) >= _MOST_READ:
        _READ.clear()
    _READ[said] = text, new
