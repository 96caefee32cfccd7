"""Which kernels run a mechanism, target by target: asked of the primitives, at which codegen registers what it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from .case import Case, cases
from .mechanism import Mechanism
from .primitives.operator import Ran, watched

_LENGTH = 33  # tokens of the problem that is run


def kernel_status(m: Mechanism) -> tuple[str, ...]:
    """One line a target; for the CPU one line per pattern where the road differs.

    >>> from .mechanism import mechanism
    >>> print(kernel_status(mechanism("softmax"))[0])
    eager   everywhere, differentiable
    """
    found = [(case.pattern, _calls(case)) for case in _asked(m)]
    if not found:
        return ("eager   a whole-model pass: what it writes into the graph decides",)
    return (
        "eager   everywhere, differentiable",
        *_lines("cpu     ", [(pattern, _together(_on_cpu, calls)) for pattern, calls in found]),
        *_lines("triton  ", [(pattern, _together(_on_gpu, calls)) for pattern, calls in found]),
    )


def _asked(m: Mechanism) -> Iterator[Case]:
    seen: set[str] = set()
    for case in cases(m, sizes=(_LENGTH,), only=lambda case: not case.grouped):
        if case.pattern not in seen:
            seen.add(case.pattern)
            yield case


def _calls(case: Case) -> list[Ran]:
    with watched() as ran:
        case.answer()
    return ran


def by_torch(ran: Sequence[Ran], device: str = "cuda") -> tuple[str, ...]:
    """Calls that ran on a device without a kernel of their own, each once and why.

    >>> by_torch([Ran("attend", "", (("generated Triton", "a head of 512, at most 256"),), device="cuda")])
    ('attend in plain torch (a head of 512, at most 256)',)
    """
    alone = [r for r in ran if r.device == device and not r.kernel]
    return tuple(dict.fromkeys(_road(r.primitive, r.kernel, r.refused) for r in alone))


def _together(road: Callable[[Ran], str], calls: list[Ran]) -> str:
    return "; ".join(dict.fromkeys(map(road, calls))) or "plain torch operations"


def _on_cpu(ran: Ran) -> str:
    return _road(ran.primitive, ran.kernel, ran.refused)


def _on_gpu(ran: Ran) -> str:
    return _road(ran.primitive, ran.on_gpu, ran.refused_there)


def _road(primitive: str, kernel: str, refused: tuple[tuple[str, str], ...]) -> str:
    if kernel:
        return f"{primitive} by {kernel}"
    why = ", ".join(dict.fromkeys(reason for _, reason in refused))
    return f"{primitive} in plain torch ({why or 'no kernel yet'})"


def _lines(target: str, found: list[tuple[str, str]]) -> list[str]:
    return [f"{target}{road}{_where(road, found)}" for road in dict.fromkeys(road for _, road in found)]


def _where(road: str, found: list[tuple[str, str]]) -> str:
    """The patterns that take a road, where there is more than one road."""
    patterns = [pattern for pattern, other in found if other == road]
    return "" if len(patterns) == len(found) else f" [{', '.join(patterns)}]"
