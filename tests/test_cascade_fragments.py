"""A primitive call as equations, run as they stand, is the primitive; mechanisms and models tell their own cascades."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from reattend.cli import app
from reattend.compiler.cascades.analysis import Verdict
from reattend.compiler.cascades.expansion import Expanded, expand
from reattend.compiler.cascades.nest import LoopNest
from reattend.compiler.cascades.of_mechanism import cascade_of, cascade_of_spec, verdict_of
from reattend.compiler.cascades.running import run
from reattend.compiler.mechanism import mechanism, mechanisms
from reattend.compiler.primitives.attend import Segment, attend
from reattend.compiler.primitives.merge import merge
from reattend.compiler.primitives.prefix import prefix
from reattend.compiler.primitives.scan import scan
from reattend.compiler.problem import problem
from reattend.compiler.symbols import table
from reattend.compiler.tracing import trace_function

Q, K, V = problem(5, 7, heads=3, dim=4, dtype=torch.float64)
MEMORY = problem(5, 3, heads=3, dim=4, dtype=torch.float64, seed=2)
S = problem(5, heads=3, dim=4, dtype=torch.float64, seed=1)  # one sequence
BIAS, VALID = torch.randn(3, 9, dtype=torch.float64), torch.tensor([[1.0, 1, 0, 1, 1, 0, 1], [0, 1, 1, 1, 0, 1, 1]])
DECAY = torch.rand(2, 3, 5, dtype=torch.float64) * 0.5 + 0.5
GIVEN = {"q": Q, "k": K, "v": V, "bias_table": BIAS, "valid": VALID}
ALIKE = {"q": S[0], "k": S[1], "v": S[2], "decay": DECAY}

Call = Callable[..., Any]
CALLS: dict[str, tuple[Call, dict[str, Tensor]]] = {
    "softmax": (lambda q, k, v, **_: attend(q, k, v, keep=lambda i, j: j <= i + 1), GIVEN),
    "a row that keeps nothing": (lambda q, k, v, **_: attend(q, k, v, keep=lambda i, j: j < i), GIVEN),
    "bias, padding, softcap": (
        lambda q, k, v, bias_table, valid, **_: attend(
            q, k, v, keep=lambda b, j: table(valid)[b, j] != 0,
            score=lambda s, h, i, j: torch.tanh(s / 3.0) * 3.0 + table(bias_table)[h, j - i + 4]), GIVEN),
    "sink": (lambda q, k, v, **_: attend(q, k, v, sink=lambda h: h * 0.5), GIVEN),
    "sigmoid": (lambda q, k, v, **_: attend(q, k, v, weight=torch.sigmoid, normaliser="none"), GIVEN),
    "relu over its sum": (
        lambda q, k, v, **_: attend(q, k, v, weight=torch.relu, normaliser="sum", eps=0.5, sink=lambda h: h + 1.0),
        GIVEN),
    "stick": (lambda q, k, v, **_: attend(q, k, v, normaliser="stick", causal=True), ALIKE),
    "two segments": (
        lambda q, k, v, mk, mv, **_: attend(q, k, v, causal=True, align="end", segments=[Segment(mk, mv)]),
        {**GIVEN, "mk": MEMORY[1], "mv": MEMORY[2]}),
    "after": (lambda q, k, v, **_: attend(q, k, v, after=lambda w, i, j: torch.relu(w - 0.1)), GIVEN),
    "log of the sum": (lambda q, k, v, **_: attend(q, k, v, outputs=("lse",)), GIVEN),
    "weights": (lambda q, k, v, **_: attend(q, k, v, causal=True, outputs=("weights",)), GIVEN),
    "sums of columns": (lambda q, k, v, **_: attend(q, k, v, causal=True, outputs=("colsum",)), GIVEN),
    "entropy": (lambda q, k, v, **_: attend(q, k, v, outputs=("entropy",)), GIVEN),
    "scan": (lambda q, k, v, **_: scan(q, k, v, feature=torch.exp, normaliser="sum", eps=0.1), ALIKE),
    "scan with a decay": (lambda q, k, v, decay, **_: scan(q, k, v, decay=decay, read="before"), ALIKE),
    "scan of all": (lambda q, k, v, **_: scan(q, k, v, causal=False, feature=torch.exp, normaliser="sum"), GIVEN),
    "prefix sum": (lambda v, **_: prefix("sum", v, reverse=True), ALIKE),
    "merge": (lambda q, k, v, **_: merge([(q, q[..., 0]), (k, k[..., 0]), (v, v[..., 0])])[0], ALIKE),
}  # fmt: skip


def expanded(call: Call, values: dict[str, Tensor]) -> Expanded:
    return expand(trace_function(lambda *t: call(**dict(zip(values, t, strict=True))), values))


@pytest.mark.parametrize("name", [name for name in CALLS if name != "merge"])  # it has no rank of keys
def test_a_fragment_run_as_it_stands_is_the_primitive(name: str) -> None:
    call, values = CALLS[name]
    found = expanded(call, values)
    tensors = {o: _without_ones(values[found.inputs[o]]) for o in found.cascade.ranks if o in found.inputs}
    tables = {o: values[p] for o, p in found.inputs.items() if p in values}
    (output,) = found.cascade.outputs
    torch.testing.assert_close(
        run(found.cascade, tensors, tables)[output], call(**values), rtol=1e-12, atol=1e-12
    )  # fmt: skip
    nest = LoopNest(found.cascade, found.keys[0])
    for tile in (1, 3, 7):
        got = nest.run(tensors, tables, tile=tile)[output]
        torch.testing.assert_close(got, call(**values), rtol=1e-12, atol=1e-12)


def _without_ones(t: Tensor) -> Tensor:
    return t.squeeze()


@pytest.mark.parametrize(
    ("name", "passes", "least", "category"),
    [
        ("softmax", 3, 1, "1-pass quadratic"),
        ("bias, padding, softcap", 3, 1, "1-pass quadratic"),
        ("sink", 3, 1, "1-pass quadratic"),
        ("two segments", 3, 1, "1-pass quadratic"),
        ("sigmoid", 1, 1, "1-pass quadratic"),
        ("relu over its sum", 2, 1, "1-pass quadratic"),
        ("stick", 1, 1, "1-pass quadratic"),
        ("after", 3, 2, "2-pass quadratic"),
        ("weights", 3, 2, "2-pass quadratic"),
        ("sums of columns", 3, 2, "2-pass quadratic"),
        ("entropy", 3, 2, "2-pass quadratic"),
        ("scan", 1, 1, "factored, recurrent"),
        ("scan with a decay", 1, 1, "factored, recurrent"),
        ("scan of all", 1, 1, "factored"),
    ],
)
def test_passes_of_a_traced_call(name: str, passes: int, least: int, category: str) -> None:
    found = verdict_of(expanded(*CALLS[name]))
    assert (found.passes, found.least, found.category) == (passes, least, category)


def of(slug: str, causal: bool = False) -> Verdict:
    cls = mechanisms()[slug]
    return verdict_of(cascade_of(mechanism(slug, **cls.tries[0]), causal=causal))


def test_registered_mechanisms_are_classified_by_what_they_compute() -> None:
    agent = of("agent")
    assert (agent.passes, agent.least, agent.category) == (3, 1, "compressed")
    assert agent.reading_of("Q", "p").least == 2  # agents are pooled queries: all of them, before any output
    assert of("linear").category == "factored"
    assert of("linear", causal=True).category == "factored, recurrent"
    assert of("window", causal=True).category == "1-pass quadratic"


def test_a_spec_tells_its_cascade_without_tensors() -> None:
    found = verdict_of(cascade_of_spec('{"score":"s * 0.5 + t0[h, i - j]","keep":"j <= i"}'))
    assert "S[b, h, p, m] = QK * 0.5 + T[h, i - j] if j <= i" in str(found.cascade)
    assert [str(b) for b in found.barriers] == ["GM soft: SD S{e^GM: -1}", "SD soft: AV S{SD: -1}"]


def test_explain_math_prints_equations_reasons_loops_and_latex() -> None:
    answer = CliRunner().invoke(app, ["explain", "--math", "softmax"])
    assert answer.exit_code == 0
    for part in ("GM soft: SD S{e^GM: -1}", "SD: exp(GM_old - GM_new)", "K over m: 3 -> 1 (hoist, running)",
                 "for each tile of m:  # pass 1 of 1", "SD = SD * exp(GM_old - GM_new) + sum[m](SN)",
                 "# states merge associatively, in any order", r"\mathit{SD}_{p} &= \sum_{m}"):  # fmt: skip
        assert part in answer.stdout
