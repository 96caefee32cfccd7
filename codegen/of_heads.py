"""What a head and the sizes N and M alone decide, worked out once a call: a table of a number a head in its place.

Loops know no sizes, and what grows with a sequence (a span for every head, a scale of log M) is the same for all pairs
of a head. It is worked out as the meaning does it, in whole numbers or float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..compiler.primitives.attend_spec import AttendSpec
from ..compiler.primitives.operator import Gradients, Groups
from ..compiler.symbol_eval import evaluate
from ..compiler.symbol_text import parse
from ..compiler.symbols import Expr, build, name

_SIZES, _KNOWN = frozenset("NM"), frozenset("hNM")
_FIRST = 3  # of the tables among a call's tensors: behind q, k and v
Asked = Callable[[Groups, str], Any]


def settling(asked: Asked) -> Asked:
    """The same question of calls whose texts name no size."""
    return lambda groups, text: asked(*settled(groups, text))


def settling_gradients(gradients: Gradients) -> Gradients:
    """The same; what such a number was made of is no place that a gradient goes on to."""

    def found(
        groups: Groups, text: str, results: Sequence[Tensor], given: Mapping[int, Tensor], wanted: Sequence[int]
    ) -> Sequence[Tensor | None] | None:
        _, numbers = without_sizes(text, len(groups[-1]))
        if {f"t{n - _FIRST}" for n in wanted} & {t for e in numbers for t in _tables(e)}:
            return None
        return gradients(*settled(groups, text), results, given, wanted)

    return found


def settled(groups: Groups, text: str) -> tuple[Groups, str]:
    """The call without sizes in its text, with a table more for each number."""
    said, numbers = without_sizes(text, len(groups[-1]))
    if not numbers:
        return groups, text
    (q,), kv, tables = groups
    heads = torch.arange(q.shape[1], device=q.device)
    names = {"h": heads, "N": q.shape[2], "M": kv[0].shape[2]}
    known = {f"t{n}": t for n, t in enumerate(tables)}
    made = [torch.as_tensor(evaluate(e, names, known), device=q.device).expand(len(heads)) for e in numbers]
    return [[q], list(kv), [*tables, *(t.to(torch.float64) if t.is_floating_point() else t for t in made)]], said


@lru_cache(maxsize=1024)
def without_sizes(text: str, first: int) -> tuple[str, tuple[Expr, ...]]:
    """The text with lookups in tables from `first` on, and the numbers of each head that these hold.

    >>> without_sizes('{"keep": "i <= M * t0[h] + j", "score": "s"}', 1)
    ('{"keep":"i <= j + t1[h]","score":"s"}', (M * t0[h],))
    """
    spec, numbers = AttendSpec.of(text), dict[str, Expr]()
    if spec.more:  # each has a number of keys of its own
        return text, ()

    def without(said: str) -> str:
        return _without(parse(said), numbers, first).text if said else said

    texts: dict[str, Any] = {
        field: without(getattr(spec, field)) for field in ("keep", "score", "weight", "sink", "after", "leader")
    }
    terms = tuple((table, without(index), side) for table, index, side in spec.relative)
    if not numbers:
        return text, ()
    return replace(spec, **texts, relative=terms).text, tuple(numbers.values())


def _without(e: Expr, numbers: dict[str, Expr], first: int) -> Expr:
    if not e.names & _SIZES:
        return e
    if e.names <= _KNOWN:
        numbers.setdefault(e.text, e)
        held = Expr("lookup", (f"t{first + list(numbers).index(e.text)}", name("h")))
        return build("ne", held, 0) if e.is_boolean else held
    own = [_without(a, numbers, first) if isinstance(a, Expr) else a for a in e.args]
    return Expr("lookup", tuple(own)) if e.op == "lookup" else build(e.op, *own)


def _tables(e: Expr) -> set[str]:
    return {each.args[0] for each in e.walk() if each.op == "lookup"}
