"""`check` finds planted bugs and says the smallest case; its report says which kernels run a mechanism."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import reattend
from reattend.compiler.case import Case
from reattend.compiler.check import Answer, Report, answer, check
from reattend.compiler.kernel_status import kernel_status
from reattend.compiler.mechanism import Limit, Mechanism, Param, mechanism, register
from reattend.compiler.primitives.attend import attend
from reattend.compiler.primitives.scan import scan
from reattend.compiler.problem import problem
from reattend.compiler.questions import QUESTIONS
from reattend.compiler.site import Site
from reattend.compiler.smallest import Failure, smallest

pytestmark = pytest.mark.usefixtures("notebook")


@dataclass(frozen=True)
class Plain(Mechanism):
    """Softmax attention; each planted bug changes one line of it."""

    kind = "exact"
    honours = {"padding"}

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, site=site)


def later(t: Tensor) -> Tensor:
    """Row i gets a little of row i + 1."""
    return t + 0.1 * torch.cat((t[:, :, 1:], t[:, :, -1:]), 2)


class LeaksQ(Plain):
    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(later(q), k, v, site=site)


class LeaksK(Plain):
    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, later(k), v, site=site)


class LeaksV(Plain):
    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, later(v), site=site)


class LooksAhead(Plain):
    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, keep=lambda i, j: j <= i + 1) if site.causal else attend(q, k, v, site=site)


class WrongLimit(Plain):
    def limits(self) -> Iterator[Limit]:
        q, k, v = problem(5)
        yield Limit("it is the mean", lambda: reattend.attention(q, k, v, self), lambda: v.mean(2, keepdim=True))


class _Doubled(torch.autograd.Function):
    """x, with a backward that is half of what it should be."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 0.5 * grad


class WrongBackward(Plain):
    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, _Doubled.apply(k), v, site=site)


class MeansHeads(Plain):
    """Permuting heads cannot see this one: a mean over heads is the same in any order."""

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = attend(q, k, v, site=site)
        return o + 0.1 * o.mean(1, keepdim=True)


class FirstHeadOnly(Plain):
    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, site=site) * (torch.arange(q.shape[1]) == 0)[:, None, None]


class SecondSampleSeesFirst(Plain):
    """The first sample is as it is alone."""

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, site=site) + 0.1 * (q[:1] - q[:1]) + 0.1 * (v[:1].mean() - v.mean((1, 2, 3), True))


class Writes(Plain):
    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k.mul_(1.5), v, site=site)


class Dice(Plain):
    """Draws, and does not say so."""

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, site=site) + 0.1 * torch.rand(1)


class Counts(Plain):
    """Remembers how often it was asked."""

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _ASKED.append(1)
        return attend(q, k, v, site=site) * len(_ASKED)


_ASKED: list[int] = []


class Turned(Plain):
    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, site=site).transpose(1, 2)


class Widens(Plain):
    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, site=site).double()


class Pair(Plain):
    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return [attend(q, k, v, site=site)]


class NoneLeft(Plain):
    """A row whose keys are all hidden is 0 / 0."""

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None = None) -> Tensor:
        weights = torch.sigmoid(q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT)
        if key_padding is not None:
            weights = weights * key_padding[:, None, None]
        weights = weights.tril() if site.causal else weights
        return weights / weights.sum(-1, keepdim=True) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)


class ForgetsPadding(Plain):
    """Says that it honours padding and does not."""

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, causal=site.causal)


class ForgetsLeftPadding(Plain):
    """Sees the first key whatever the mask says."""

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, site=site) + 0.1 * v[:, :, :1].repeat_interleave(q.shape[1] // v.shape[1], 1)


class WrongStep(Plain):
    """Forgets the oldest token at every step."""

    def state(self, site: Site, q: Tensor) -> Mapping[str, Tensor]:
        return {"v": q.new_zeros(q.shape[0], site.kv_heads, 0, site.v_dim)}

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ones = torch.ones_like(q[..., :1])
        return scan(ones, ones[:, : v.shape[1]], v, causal=site.causal, normaliser="sum")

    def prefill(self, site: Site, p: Any, state: Mapping[str, Tensor], q: Tensor, k: Tensor, v: Tensor) -> Any:
        both = torch.cat((state["v"], v), 2)
        counts = torch.arange(1, both.shape[2] + 1, dtype=v.dtype)[:, None]
        means = (both.cumsum(2) / counts)[:, :, -v.shape[2] :]
        return means.repeat_interleave(q.shape[1] // v.shape[1], 1), {"v": both}

    def step(self, site: Site, p: Any, state: Mapping[str, Tensor], q: Tensor, k: Tensor, v: Tensor) -> Any:
        o, after = self.prefill(site, p, state, q, k, v)
        return o, {"v": after["v"][:, :, 1:]}


PLANTED = [
    (LeaksQ, "causal", "H=1 N=3 M=3 D=1: row 1 changes with q from token 2 on"),  # row 0 has one key: no choice
    (LeaksK, "causal", "H=1 N=3 M=3 D=1: row 1 changes with k from token 2 on"),
    (LeaksV, "causal", "N=2 M=2 D=1: row 0 changes with v from token 1 on"),
    (LooksAhead, "causal", "on causal-self B=1 H=1 N=2 M=2 D=1: row 0 changes with k, v from token 1 on"),
    (WrongLimit, "limits", "limit 'it is the mean': off by"),
    (WrongBackward, "gradients", "the gradient of k is"),
    (MeansHeads, "apart", "H=2 N=1 M=1 D=1: heads change with the last head"),
    (FirstHeadOnly, "heads", "B=1 H=2 N=1 M=1 D=1: heads in order [1, 0]"),
    (SecondSampleSeesFirst, "batch", "B=2 H=1 N=1 M=1 D=1: sample 1 alone"),
    (Writes, "inputs", "B=1 H=1 N=1 M=1 D=1: writes to k"),
    (Dice, "deterministic", "B=1 H=1 N=1 M=1 D=1: asked twice"),
    (Counts, "deterministic", "B=1 H=1 N=1 M=1 D=1: asked twice"),
    (Turned, "lengths", "B=1 H=2 N=1 M=1 D=1: shape (1, 1, 2, 1), not (1, 2, 1, 1)"),
    (Widens, "lengths", "B=1 H=1 N=1 M=1 D=1: torch.float64 out of torch.float32"),
    (Pair, "lengths", "forward gives a list: a tensor, or (tensor, Aux(...))"),
    (NoneLeft, "empty rows", "B=1 H=1 N=1 M=1 D=1: a sample whose keys are all hidden by padding is not finite"),
    (ForgetsPadding, "honours", "N=1 M=1 D=1: key 0 hidden by padding"),
    (ForgetsLeftPadding, "honours", "N=1 M=1 D=1: key 0 hidden by padding"),
    (WrongStep, "decode", "B=1 H=1 N=3 M=3 D=1: row 2 after a prefill of 1: off by"),
]


def asked(cls: type[Mechanism], name: str) -> Answer:
    register("planted")(cls)
    return answer(cls(), next(question for question in QUESTIONS if question.name == name))


@pytest.mark.parametrize(("cls", "question", "says"), PLANTED, ids=[cls.__name__ for cls, _, _ in PLANTED])
def test_a_planted_bug_is_found_at_the_smallest_case(cls: type[Mechanism], question: str, says: str) -> None:
    assert says in asked(cls, question).failure


@pytest.mark.parametrize("question", ["causal", "gradients", "apart", "batch", "inputs", "empty rows", "decode"])
def test_what_is_right_is_left_alone(question: str) -> None:
    found = asked(Plain, question)
    assert not found.failure and found.asked


def test_a_head_that_reads_others_may_say_so() -> None:
    class Talking(MeansHeads):
        heads_apart = False

    assert not asked(Talking, "apart").failure


def test_a_mechanism_that_cannot_decode_says_why() -> None:
    found = answer(mechanism("sigmoid", bias="-ln(M)"), next(q for q in QUESTIONS if q.name == "decode"))
    assert not found.failure and "not derived: token by token differs" in str(found)


def test_what_draws_and_declares_it_is_deterministic() -> None:
    @dataclass(frozen=True)
    class Noisy(Plain):
        def draws(self, site: Site) -> Mapping[str, Param]:
            return {"noise": Param((site.dim,), torch.Tensor.normal_)}

        def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v, site=site) + p.noise

    assert not asked(Noisy, "deterministic").failure


def test_a_drawn_tensor_is_filled_as_a_learned_one_is_whatever_its_function_returns() -> None:
    def ones(tensor: torch.Tensor) -> None:
        tensor.fill_(1.0)

    @dataclass(frozen=True)
    class Drawing(Plain):
        def draws(self, site: Site) -> Mapping[str, Param]:
            return {"factor": Param((site.dim,), ones)}

        def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q * p.factor, k, v, site=site)

    q, k, v = torch.randn(3, 1, 2, 5, 4)
    torch.testing.assert_close(reattend.attention(q, k, v, Drawing()), reattend.attention(q, k, v, Plain()))


def test_each_size_is_made_less_until_it_would_not_fail() -> None:
    def ask(case: Case) -> int:
        if case.n >= 3 and case.heads >= 2 and case.dim >= 4:
            raise Failure(str(case))
        return 1

    case = Case(mechanism("softmax"), n=33, m=33)
    assert str(smallest(case, ask, Failure(str(case)))).endswith("B=1 H=2 N=3 M=3 D=4")


def test_the_report_ends_with_the_kernels_and_the_smallest_case() -> None:
    assert kernel_status(mechanism("softmax")) == (
        "eager   everywhere, differentiable",
        "cpu     attend by sdpa",
        "triton  attend by sdpa",
    )
    assert "triton  attend by generated Triton" in kernel_status(mechanism("window", window=3))
    assert "cpu     attend by sdpa in blocks of rows" in kernel_status(mechanism("window", window=3))
    assert "attend in plain torch (fewer than 32768 scores, normaliser none)" in kernel_status(mechanism("sigmoid"))[1]
    once = next(question for question in QUESTIONS if question.name == "batch")
    answers = asked(SecondSampleSeesFirst, "batch"), answer(mechanism("softmax"), once)
    report = Report(answers, {"Softmax()": ("eager",)})
    lines = str(report).splitlines()
    assert lines[:1] + lines[2:3] == ["SecondSampleSeesFirst()", "Softmax()"]
    assert lines[-2] == "  kernel eager" and "smallest: SecondSampleSeesFirst() on causal-self B=2 H=1 N=1" in lines[-1]
    assert report.to_dict()["kernels"] == {"Softmax()": ["eager"]}


@pytest.mark.slow
def test_all_questions_are_asked_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert check("softmax").ok
    shown = capsys.readouterr().out
    assert all(f"  {question.name}" in shown for question in QUESTIONS) and "kernel triton  attend by sdpa" in shown
