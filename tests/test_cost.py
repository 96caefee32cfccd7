"""What an operation costs, node by node, beside what torch counts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import reattend.passes  # noqa: F401  (registers the mechanisms)
from reattend.compiler.case import Case, cases
from reattend.compiler.check import variants
from reattend.compiler.cost import node_cost
from reattend.compiler.mechanism import mechanisms


class Counted(fx.Interpreter):
    """Runs a graph and keeps what torch counts at each node; it knows products, and no operation of ours."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.found: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        with FlopCounterMode(display=False) as counter:
            n.meta["val"] = super().run_node(n)
        self.found[n] = counter.get_total_flops()
        return n.meta["val"]


def counted(call: Callable[[], Any]) -> dict[fx.Node, int]:
    with torch.no_grad():
        torch.manual_seed(0)
        run = Counted(make_fx(lambda: call(), pre_dispatch=True)())
        torch.manual_seed(0)  # what is drawn decides shapes in hashed mechanisms
        run.run()
    return run.found


@pytest.mark.parametrize("slug", mechanisms())
def test_products_of_a_mechanism_cost_what_torch_counts(slug: str) -> None:
    asked: dict[tuple[object, str], Case] = {}
    for m in variants(slug):
        for case in cases(m, sizes=(33,), only=lambda c: not c.grouped):
            asked.setdefault((m, case.pattern), case)
    for case in asked.values():
        for node, count in counted(case.answer).items():
            if count:
                assert node_cost(node).products == pytest.approx(count, rel=0.01), (case.pattern, node.target)


def test_einsums_are_multiplied_pair_by_pair() -> None:
    a, b, c = torch.randn(3, 4, 5), torch.randn(5, 6), torch.randn(1, 4, 6)
    for equation, operands in (
        ("abc,cd->abd", (a, b)),
        ("abc,cd", (a, b)),
        ("abc,cd,abd->ad", (a, b, c)),  # an axis of one that meets a wider one
        ("...c,c...->...", (a[0], b[:, :4])),
        ("abc->ca", (a,)),
    ):
        found = counted(partial(torch.einsum, equation, *operands))
        ((ours, theirs),) = [(node_cost(n).products, count) for n, count in found.items() if "einsum" in str(n.target)]
        assert ours == theirs, equation
