"""`check`: ask a mechanism the questions that all must answer, and show the smallest problem it fails on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby

from .kernel_status import kernel_status
from .mechanism import Mechanism, mechanism, mechanisms
from .questions import QUESTIONS, Question
from .refusal import Refused
from .smallest import Beside, Failure


@dataclass(frozen=True)
class Answer:
    mechanism: Mechanism
    question: Question
    asked: int  # problems asked about, up to the first failure
    failure: str = ""
    beside: str = ""  # why the question does not apply

    def __str__(self) -> str:
        verdict = "FAILS" if self.failure else "holds" if self.asked else "  -  "
        count = f"{self.asked} problems" if self.asked else self.beside or "does not apply"
        return f"  {verdict}  {self.question.name:14} {self.failure or count}"


@dataclass(frozen=True)
class Report:
    """Every answer, and below them which kernels run the mechanism on each target."""

    answers: tuple[Answer, ...]
    kernels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # by the mechanism's text

    @property
    def ok(self) -> bool:
        return not self.failures

    @property
    def failures(self) -> tuple[Answer, ...]:
        return tuple(a for a in self.answers if a.failure)

    def to_dict(self) -> dict[str, object]:
        return {
            "ok": self.ok,
            "answers": [
                {
                    "mechanism": repr(a.mechanism),
                    "question": a.question.name,
                    "asked": a.asked,
                    "failure": a.failure,
                    "beside": a.beside,
                }
                for a in self.answers
            ],
            "kernels": {of: list(lines) for of, lines in self.kernels.items()},
        }

    def __str__(self) -> str:
        lines: list[str] = []
        for title, answers in groupby(self.answers, lambda answer: repr(answer.mechanism)):
            lines += [title, *map(str, answers), *(f"  kernel {line}" for line in self.kernels.get(title, ()))]
        last = "all questions hold" if self.ok else f"{len(self.failures)} failed; smallest: {self.failures[0].failure}"
        return "\n".join((*lines, last))


def check(which: str | type[Mechanism] | Mechanism, *, show: bool = True) -> Report:
    """Ask a mechanism (a slug, a class: with all the knobs it names in `tries`; a value: as it is) every question.

    >>> check("softmax", show=False).ok
    True
    """
    asked = variants(which)
    answers = tuple(answer(m, question) for m in asked for question in QUESTIONS)
    report = Report(answers, {repr(m): kernel_status(m) for m in asked})
    if show:
        print(report)
    return report


def variants(which: str | type[Mechanism] | Mechanism) -> tuple[Mechanism, ...]:
    """The values of a mechanism that are asked."""
    if isinstance(which, Mechanism):
        return (which,)
    cls = type(mechanism(which)) if isinstance(which, str) else which
    if not (isinstance(cls, type) and issubclass(cls, Mechanism)):
        raise Refused(f"{which!r} is no mechanism", where="check", fits="a registered name, or a Mechanism's class")
    if mechanisms().get(cls.slug) is not cls:
        raise Refused(f"{cls.__name__} is not registered", where="check", fits="@register('name') above the class")
    return tuple(cls(**knobs) for knobs in cls.tries)


def answer(m: Mechanism, question: Question) -> Answer:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch.export and gradcheck warn about is not the mechanism's
            return Answer(m, question, question.ask(m))
    except Beside as reason:
        return Answer(m, question, 0, beside=str(reason))
    except Failure as failure:
        return Answer(m, question, 0, str(failure))
    except Exception as error:  # a crash is an answer too
        return Answer(m, question, 0, f"{type(error).__name__}: {error}")
