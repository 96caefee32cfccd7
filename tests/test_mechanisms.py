"""Every registered mechanism answers the same questions; planted bugs show that the questions find them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import reattend.passes
from reattend.compiler.case import PLACED
from reattend.compiler.catalogue import mechanism_table
from reattend.compiler.check import Answer, answer, check, variants
from reattend.compiler.functional import attention
from reattend.compiler.mechanism import Limit, Mechanism, Param, mechanisms, register
from reattend.compiler.primitives.attend import attend
from reattend.compiler.problem import problem
from reattend.compiler.questions import QUESTIONS, Question
from reattend.compiler.refusal import Refused


def asked(m: Mechanism, question: Question, nth: int) -> Any:
    """An export takes as long as the other questions together: the fast tier exports each mechanism's first value."""
    slow = [pytest.mark.slow] if nth and question.name == "export" else []
    return pytest.param(m, question, marks=slow, id=f"{m!r}-{question.name}")


ASKED = [
    asked(m, question, nth) for slug in mechanisms() for nth, m in enumerate(variants(slug)) for question in QUESTIONS
]


@cache
def answered(m: Mechanism, question: Question) -> Answer:
    return answer(m, question)


@pytest.mark.parametrize(("m", "question"), ASKED)
def test_answers(m: Mechanism, question: Question) -> None:
    failure = answered(m, question).failure
    assert not failure, failure


@pytest.mark.parametrize("slug", list(mechanisms()))
def test_states_its_exact_cases_and_its_paper(slug: str) -> None:
    cls = mechanisms()[slug]
    assert cls.paper.startswith("arXiv ")
    assert cls.part == "model" or list(cls().limits()), "no exact case"


@pytest.mark.slow  # asks everything once more
@pytest.mark.parametrize("slug", [slug for slug, cls in mechanisms().items() if cls.part in PLACED])
def test_is_asked_about_something(slug: str) -> None:
    """A question that finds no problem to ask about cannot fail: most of them must find some."""
    asked = {question.name for m in variants(slug) for question in QUESTIONS if answered(m, question).asked}
    assert {"limits", "lengths", "gradients", "batch", "deterministic", "half", "text", "refusals", "export"} <= asked


def test_the_page_of_the_docs_is_the_registry() -> None:
    page = Path(reattend.__path__[0]) / "docs" / "mechanisms.md"
    again = "make tables"
    assert page.read_text(encoding="utf-8") == mechanism_table().markdown() + "\n", again


@dataclass(frozen=True)
class Plain(Mechanism):
    """Causal softmax attention; each planted bug changes one line of it."""

    kind = "exact"
    honours = {"padding"}

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, site=site)

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(5)
        yield Limit("it is softmax", lambda: attention(q, k, v, self), lambda: attention(q, k, v, "softmax"))


class Leak(Plain):
    """Sees one token ahead."""

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, keep=lambda i, j: j <= i + 1) if site.causal else attend(q, k, v, site=site)


class FarLeak(Plain):
    """Sees the mean of all values, a little."""

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, site=site) + 1e-3 * v.mean(2, keepdim=True).repeat_interleave(
            q.shape[1] // v.shape[1], 1
        )


class WrongLimit(Plain):
    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(5)
        yield Limit("it is the mean", lambda: attention(q, k, v, self), lambda: v.mean(2, keepdim=True).expand_as(v))


class WrongGradient(Plain):
    """Half of k's gradient is lost."""

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, 0.5 * k + 0.5 * k.detach(), v, site=site)


class IdleTensor(Plain):
    """A learned tensor that nothing learns."""

    def params(self, site: Any) -> dict[str, Param]:
        return {"w": Param((site.heads,))}

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, site=site) + 0 * p.w[:, None, None]


class FirstHeadOnly(Plain):
    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, site=site) * (torch.arange(q.shape[1]) == 0)[:, None, None]


class MixesSamples(Plain):
    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, site=site) * q.mean().tanh()


class Forgetful(Plain):
    """Says that it honours padding and does not."""

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, causal=site.causal)


class LengthOfOne(Plain):
    """Divides by n - 1."""

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, site=site) / torch.full((1,), q.shape[2] - 1, dtype=q.dtype)


class WidensHalf(Plain):
    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (
            attend(q.float(), k.float(), v.float(), site=site)
            if q.dtype != torch.float64
            else attend(q, k, v, site=site)
        )


class BranchesOnLength(Plain):
    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, site=site) if q.shape[2] < 8 else attend(q, k, v, site=site) + q.shape[2] % 2


@dataclass(frozen=True)
class Unwritable(Plain):
    where: frozenset[int] = frozenset({1})


PLANTED = {
    Leak: "causal",
    FarLeak: "causal",
    WrongLimit: "limits",
    WrongGradient: "gradients",
    IdleTensor: "gradients",
    FirstHeadOnly: "heads",
    MixesSamples: "batch",
    Forgetful: "honours",
    LengthOfOne: "lengths",
    WidensHalf: "half",
    BranchesOnLength: "export",
    Unwritable: "text",
}


@pytest.mark.usefixtures("notebook")
def test_a_right_one_from_a_notebook_cell_holds() -> None:
    register("plain")(Plain)
    assert check(Plain, show=False).ok


@pytest.mark.usefixtures("notebook")
@pytest.mark.parametrize("cls", list(PLANTED), ids=lambda cls: cls.__name__)
def test_planted_bug_is_found(cls: type[Mechanism]) -> None:
    register("planted")(cls)
    found = answer(cls(), next(question for question in QUESTIONS if question.name == PLANTED[cls]))
    assert cls.__name__ in found.failure or "limit" in found.failure


@pytest.mark.usefixtures("notebook")
def test_the_smallest_failing_problem_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    register("planted")(Leak)
    report = check(Leak)
    failure = next(a.failure for a in report.failures if a.question.name == "causal")
    assert f"FAILS  causal         {failure}" in capsys.readouterr().out
    assert failure.startswith("Leak() on causal-self B=1 H=1 N=2 M=2 D=1: row 0 changes with k, v from token 1 on")


def test_unregistered_and_unknown_ones_are_refused() -> None:
    with pytest.raises(Refused, match="not registered"):
        check(Plain, show=False)
    with pytest.raises(Refused, match="did you mean 'window'"):
        check("windw", show=False)
