"""What is known about indices for certain, and the simplification of predicates that follows from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..symbols import FALSE, TRUE, Expr, build, const, name

I, N, M = name("i"), name("N"), name("M")


@dataclass(frozen=True)
class IndexSpace:
    """Row i of N queries and key j of M keys; `queries` and `keys` are numbers where the graph is static."""

    queries: Expr = N
    keys: Expr = M
    covers: bool = False  # M >= N is known: the queries are the last of the keys

    def never_negative(self, e: Expr) -> bool:
        """True only where an integer expression is >= 0 for every index and every size."""
        affine = _affine(e)
        return affine is not None and self._lowest(*affine) >= 0

    def _lowest(self, terms: dict[str, Any], constant: Any) -> float:
        terms = dict(terms)
        for index, size in (("i", self.queries), ("j", self.keys)):
            factor = terms.pop(index, 0)
            if factor < 0:  # the largest index is size - 1
                more, shift = _affine(size - 1) or ({"?": -1}, 0)
                constant += factor * shift
                for key, value in more.items():
                    terms[key] = terms.get(key, 0) + factor * value
        if self.covers and terms.get("M", 0) > 0:  # M = N + (something >= 0)
            terms["N"] = terms.get("N", 0) + terms.pop("M")
        if any(value < 0 for value in terms.values()) or not set(terms) <= {"b", "h", "N", "M"}:
            return -float("inf") if any(v != 0 for v in terms.values()) else constant
        return float(constant + terms.get("N", 0) + terms.get("M", 0))  # both sizes are at least 1


ANYWHERE = IndexSpace()


def simplify_indices(e: Expr, space: IndexSpace = ANYWHERE) -> Expr:
    """The same predicate over 0 <= i < N, 0 <= j < M with conditions that always or never hold decided.

    >>> from ..symbol_text import parse
    >>> simplify_indices(parse("(j >= 0) & (j <= i) & (j <= i + 3) & (i < N)"))
    j <= i
    """
    if not any(isinstance(arg, Expr) for arg in e.args):
        return e
    e = _rebuild(e, tuple(simplify_indices(a, space) if isinstance(a, Expr) else a for a in e.args))
    if e.op == "le" and _is_index(e):
        return _decide(e, space)
    if e.op in ("eq", "ne"):
        return _compared(e)
    if e.op in ("floordiv", "mod"):
        return _divided(e, space)
    if e.op == "add":
        return _divided_and_joined(e)
    if e.op in ("and", "or"):
        return _without_implied(_absorbed(e))
    return e


def _compared(e: Expr) -> Expr:
    """`x - y == 0` is `x == y`."""
    for zero, other in (e.args, e.args[::-1]):
        if zero.op == "const" and zero.args[0] == 0 and other.op == "add" and len(other.args) == 2:
            for x, y in (other.args, other.args[::-1]):
                if y.op == "mul" and len(y.args) == 2 and y.args[1].op == "const" and y.args[1].args[0] == -1:
                    return build(e.op, *sorted((x, y.args[0]), key=lambda side: side.text))
    return e


def _absorbed(e: Expr) -> Expr:
    """`a | (~a & b)` is `a | b`, `a | b | (~a & ~b)` is true, and the same with both signs turned."""
    dual, whole = ("or", FALSE) if e.op == "and" else ("and", TRUE)
    opposite = {(~part).text for part in e.args}
    parts = []
    for part in e.args:
        kept = [a for a in part.args if a.text not in opposite] if part.op == dual else [part]
        parts.append(build(dual, *kept) if len(kept) > 1 else kept[0] if kept else whole)
    return build(e.op, *parts)


def _rebuild(e: Expr, args: tuple[Any, ...]) -> Expr:
    if all(new is old for new, old in zip(args, e.args, strict=True)):
        return e
    return Expr("lookup", args) if e.op == "lookup" else build(e.op, *args)


def _is_index(e: Expr) -> bool:
    return all(a.is_integer for a in e.args)


def _decide(e: Expr, space: IndexSpace) -> Expr:
    left, right = e.args
    if space.never_negative(right - left):
        return TRUE
    return FALSE if space.never_negative(left - right - 1) else e


def _divided(e: Expr, space: IndexSpace) -> Expr:
    top, bottom = e.args
    if bottom.is_integer and top.is_integer and space.never_negative(top) and space.never_negative(bottom - top - 1):
        return const(0) if e.op == "floordiv" else top
    return e


def _divided_and_joined(e: Expr) -> Expr:
    """`x // c * c + x % c` is x."""
    texts = {part.text: part for part in e.args}
    for part in e.args:
        if part.op == "mod" and part.is_integer:
            whole = (build("floordiv", *part.args) * part.args[1]).text
            if whole in texts:
                rest = [p for p in e.args if p is not part and p is not texts[whole]]
                return build("add", part.args[0], *rest)
    return e


def _without_implied(e: Expr) -> Expr:
    """Of `x <= y + 3` and `x <= y + 5`, `and` needs the first, `or` the second; `x <= y + 3 | y <= x` always holds."""
    if e.op not in ("and", "or"):
        return e
    best: dict[tuple[tuple[str, Any], ...], tuple[Any, Expr]] = {}
    rest: list[Expr] = []
    for part in e.args:
        affine = _affine(part.args[0] - part.args[1]) if part.op == "le" and _is_index(part) else None
        if affine is None:
            rest.append(part)
            continue
        key = tuple(sorted(affine[0].items()))
        tighter = key not in best or (affine[1] > best[key][0]) == (e.op == "and")
        if tighter:
            best[key] = (affine[1], part)
    for key, (above, _) in best.items():  # x + above <= 0, and -x + below <= 0
        below = best.get(tuple((name, -factor) for name, factor in key), (None, None))[0]
        if below is not None and (above + below > 0 if e.op == "and" else above + below <= 1):
            return FALSE if e.op == "and" else TRUE
    return build(e.op, *rest, *(part for _, part in best.values()))


def _affine(e: Expr) -> tuple[dict[str, Any], Any] | None:
    """Names with their factors, and the constant; None where the expression is no such sum."""
    if not e.is_integer:
        return None
    terms: dict[str, Any] = {}
    constant: Any = 0
    for part in _addends(e):
        factor = 1
        if part.op == "mul" and len(part.args) == 2 and part.args[1].op == "const":
            part, factor = part.args[0], part.args[1].args[0]
        if part.op == "const":
            constant += part.args[0] * factor
        elif part.op == "name":
            terms[part.args[0]] = terms.get(part.args[0], 0) + factor
        else:
            terms[part.text] = terms.get(part.text, 0) + factor
    return {k: v for k, v in terms.items() if v != 0}, constant


def _addends(e: Expr) -> Iterable[Expr]:
    return e.args if e.op == "add" else (e,)
