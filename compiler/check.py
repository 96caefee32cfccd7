"""`check`: ask a mechanism the questions that all must answer, and show the smallest problem it fails on."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from .mechanism import Mechanism, mechanism, mechanisms
from .questions import QUESTIONS, Failure, Question
from .refusal import Refused


@dataclass(frozen=True)
class Answer:
    mechanism: Mechanism
    question: Question
    asked: int  # problems asked about, up to the first failure
    failure: str = ""

    def __str__(self) -> str:
        verdict = "FAILS" if self.failure else "holds" if self.asked else "  -  "
        count = f"{self.asked} problems" if self.asked else "does not apply"
        return f"  {verdict}  {self.question.name:14} {self.failure or count}"


@dataclass(frozen=True)
class Report:
    answers: tuple[Answer, ...]

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
                {"mechanism": repr(a.mechanism), "question": a.question.name, "asked": a.asked, "failure": a.failure}
                for a in self.answers
            ],
        }

    def __str__(self) -> str:
        lines: list[str] = []
        for answer in self.answers:
            title = repr(answer.mechanism)
            if title not in lines:
                lines.append(title)
            lines.append(str(answer))
        last = "all questions hold" if self.ok else f"{len(self.failures)} failed; smallest: {self.failures[0].failure}"
        return "\n".join((*lines, last))


def check(which: str | type[Mechanism] | Mechanism, *, show: bool = True) -> Report:
    """Ask a mechanism (a slug, a class: with all the knobs it names in `tries`; a value: as it is) every question.

    >>> check("softmax", show=False).ok
    True
    """
    report = Report(tuple(answer(m, question) for m in variants(which) for question in QUESTIONS))
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
    except Failure as failure:
        return Answer(m, question, 0, str(failure))
    except Exception as error:  # a crash is an answer too
        return Answer(m, question, 0, f"{type(error).__name__}: {error}")
