"""One site's view of the graph's symbolic sizes: which of them are N and M, and any size as an expression in those."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped, unused-ignore]
import torch
from torch import fx

from ..symbols import Expr, build, const
from .index_space import IndexSpace, M, N


class Unreadable(Exception):
    """Why a value cannot be written as an expression over indices; it stays a tensor then."""


@dataclass(frozen=True)
class Frame:
    """Symbols of the graph's sizes as expressions in N and M, and what that says about indices."""

    symbols: tuple[tuple[sympy.Symbol, Expr], ...]
    space: IndexSpace

    @staticmethod
    def of(queries: Any, keys: Any) -> Frame:
        """From the number of query rows and of keys, as q's and k's fake values know them."""
        n, m = formula(queries), formula(keys)
        known: dict[sympy.Symbol, Expr] = {}
        _learn(n, N, known)
        _learn(m, M, known)
        gap = sympy.expand(m - n)
        covers = all(part.is_nonnegative for part in sympy.Add.make_args(gap))
        rows = const(int(n)) if n.is_number else N
        columns = const(int(m)) if m.is_number else rows if m == n else M
        return Frame(tuple(known.items()), IndexSpace(rows, columns, covers))

    def size(self, value: Any) -> Expr:
        """A size (number, SymInt, or the node of one) as an expression."""
        if isinstance(value, fx.Node):
            value = value.meta.get("val")
        if isinstance(value, bool | float):
            return const(value)
        if not isinstance(value, int | torch.SymInt):
            raise Unreadable(f"{type(value).__name__} where a size is expected")
        return self._expr(formula(value))

    def _expr(self, e: sympy.Expr) -> Expr:
        if e.is_Integer:
            return const(int(e))
        if e.is_Symbol:
            for symbol, known in self.symbols:
                if symbol == e:
                    return known
            raise Unreadable(f"size {e} is neither N nor M")
        if isinstance(e, sympy.Add | sympy.Mul):
            parts = [self._expr(a) for a in e.args]
            total = parts[0]
            for part in parts[1:]:
                total = build("add" if isinstance(e, sympy.Add) else "mul", total, part)
            return total
        raise Unreadable(f"size {e}")


def formula(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def _learn(size: sympy.Expr, named: Expr, known: dict[sympy.Symbol, Expr]) -> None:
    """size = named, solved for its one symbol that is not known yet."""
    new = [s for s in sorted(size.free_symbols, key=str) if s not in known]
    if len(new) != 1:
        return
    rest = sympy.expand(size - new[0])
    if new[0] in rest.free_symbols:  # not once, with factor 1
        return
    if rest.is_Integer:
        known[new[0]] = named - int(rest)
    elif rest.free_symbols <= set(known):
        known[new[0]] = named - Frame(tuple(known.items()), IndexSpace())._expr(rest)
