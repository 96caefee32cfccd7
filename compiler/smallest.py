"""A question is asked case by case, and the first case that fails is made as small as it can be and still fail."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .case import Case
from .mechanism import Mechanism

TRIALS = 150  # smaller cases that are tried at most


@dataclass(frozen=True)
class Failure(Exception):
    """The smallest problem on which a question is answered wrongly."""

    says: str

    def __str__(self) -> str:
        return self.says


class Beside(Exception):
    """A question that a mechanism does not answer, and why that is no fault."""


def of_each(
    found: Callable[[Mechanism], Iterable[Case]],
) -> Callable[[Callable[[Case], int]], Callable[[Mechanism], int]]:
    """From a question about one case to one about a mechanism, which counts the answers."""

    def question(ask: Callable[[Case], int]) -> Callable[[Mechanism], int]:
        def of_all(m: Mechanism) -> int:
            count = 0
            for case in found(m):
                try:
                    count += ask(case)
                except Beside:
                    raise
                except Exception as error:  # a crash is an answer too
                    raise smallest(case, ask, error) from None
            return count

        of_all.__doc__, of_all.__name__ = ask.__doc__, ask.__name__
        return of_all

    return question


def smallest(case: Case, ask: Callable[[Case], int], error: Exception) -> Failure:
    """One size after another is made less while the same kind of error comes back."""
    left = TRIALS
    found = True
    while found and left > 0:
        found = False
        for less in case.smaller():
            left -= 1
            again = _error(less, ask)
            if again is not None and type(again) is type(error):
                case, error, found = less, again, True
                break
    return error if isinstance(error, Failure) else Failure(f"{case}: {first_lines(error)}")


def _error(case: Case, ask: Callable[[Case], int]) -> Exception | None:
    try:
        if case.stands:
            ask(case)
    except Exception as error:
        return error
    return None


def first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:300]}"
