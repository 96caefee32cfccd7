"""Which kernels run a mechanism, target by target: asked of the primitives, at which codegen registers what it has."""

from __future__ import annotations

from collections.abc import Iterator

from .case import Case, cases
from .mechanism import Mechanism
from .primitives.attend import attend_op
from .primitives.operator import Ran, watched

_LENGTH = 33  # tokens of the problem that is run


def kernel_status(m: Mechanism) -> tuple[str, ...]:
    """One line a target; for the CPU one line per pattern where the road differs.

    >>> from .mechanism import mechanism
    >>> print(kernel_status(mechanism("softmax"))[0])
    eager   everywhere, differentiable
    """
    found = [(case.pattern, _roads(case)) for case in _asked(m)]
    if not found:
        return ("eager   a whole-model pass: what it writes into the graph decides",)
    roads = dict.fromkeys(road for _, road in found)
    lines = [f"cpu     {road}{_where(road, found)}" for road in roads]
    generated = any(kernel.name.startswith("triton") for kernel in attend_op.kernels.get("cuda", []))
    return (
        "eager   everywhere, differentiable",
        *lines,
        f"triton  {'generated' if generated else 'not generated yet'}",
    )


def _asked(m: Mechanism) -> Iterator[Case]:
    seen: set[str] = set()
    for case in cases(m, sizes=(_LENGTH,), only=lambda case: not case.grouped):
        if case.pattern not in seen:
            seen.add(case.pattern)
            yield case


def _roads(case: Case) -> str:
    with watched() as ran:
        case.answer()
    calls = list(dict.fromkeys(map(_road, ran)))
    return "; ".join(calls) or "plain torch operations"


def _road(ran: Ran) -> str:
    if ran.kernel:
        return f"{ran.primitive} by {ran.kernel}"
    why = ", ".join(dict.fromkeys(reason for _, reason in ran.refused))
    return f"{ran.primitive} in plain torch ({why or 'no kernel yet'})"


def _where(road: str, found: list[tuple[str, str]]) -> str:
    """The patterns that take a road, where there is more than one road."""
    patterns = [pattern for pattern, other in found if other == road]
    return "" if len(patterns) == len(found) else f" [{', '.join(patterns)}]"
