"""MoA: masks against the card's rule row by row; influence against finite differences; plans against brute force."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from hosted_models import ids, llama
from language_swaps import close, row_by_row, swapped

import reattend
from reattend.compiler.decode import Decoder
from reattend.compiler.functional import attention
from reattend.compiler.problem import problem
from reattend.compiler.refusal import Refused
from reattend.compiler.site import Site
from reattend.passes.sparse.moa import MoA
from reattend.passes.sparse.moa_search import choose, costs, grid, influence, layout, moa_search, tables, weighed


@pytest.mark.parametrize(
    "knobs",
    [
        {"alpha": 3, "beta": 0.25, "block_size": 2, "min_span": 1, "max_new_tokens": 4},
        {"alpha": (1, 9), "beta": (0.5, 0.0), "block_size": 3, "min_span": 4, "max_new_tokens": 0},
        {"alpha": (-6.0, -2.0, 2.0, 5.0), "beta": 0.6, "block_size": 2, "min_span": 2, "sink_blocks": 2},
        {"alpha": 2, "beta": 0.0, "block_size": 2, "min_span": 1, "sink_blocks": 0},
        {"alpha": 1, "beta": 0.0, "block_size": 2, "min_span": 1, "sink_blocks": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("n", [5, 13])
def test_rule(knobs: dict[str, Any], n: int) -> None:
    q, k, v = problem(n, kv_heads=2)
    bs, total = knobs["block_size"], n + knobs.get("max_new_tokens", 1024)

    def seen(h: int, i: int) -> list[int]:
        a, b = (x[h * len(x) // 4] if isinstance(x, tuple) else x for x in (knobs["alpha"], knobs["beta"]))
        span = math.ceil(max(min(int(a + b * total), total), knobs["min_span"]) / bs)
        sink = min(span, knobs.get("sink_blocks", 1))
        return [j for j in range(i + 1) if j // bs < sink or j // bs > i // bs - (span - sink)]

    assert close(attention(q, k, v, "moa", causal=True, **knobs), row_by_row(q, k, v, seen))


def test_a_fixed_length_decodes() -> None:
    site = Site("layer", 0, heads=4, kv_heads=4, dim=8, v_dim=8, scale=8**-0.5, pattern="causal-self")
    how = MoA(alpha=(1, 2, 4, 6), beta=0.25, block_size=2, min_span=1, max_new_tokens=4, length=8)
    decoder = Decoder(how, site)
    q, k, v = problem(12)
    whole = attention(q, k, v, how, causal=True)
    parts = [decoder.prefill(q[:, :, :8], k[:, :, :8], v[:, :, :8])]
    parts += [decoder.step(q[:, :, n : n + 1], k[:, :, n : n + 1], v[:, :, n : n + 1]) for n in range(8, 12)]
    assert close(torch.cat(parts, 2), whole)


def test_in_a_llama_whose_length_is_open() -> None:
    knobs = {"alpha": (1, 3), "beta": (0.0, 0.25), "block_size": 2, "min_span": 1, "max_new_tokens": 0}
    model, fast = swapped("moa", **knobs)
    x = ids(2, 17)
    assert (fast(input_ids=x).logits - model(input_ids=x).logits).abs().max() > 1e-4
    direct = reattend.optimize(
        model, {"version": 1, "sites": [{"match": "*", "attention": {"moa": knobs}}]}, {"input_ids": x}, measure=False
    )
    assert close(fast(input_ids=x).logits, direct(input_ids=x).logits)


@pytest.mark.parametrize(
    ("knobs", "causal", "match"),
    [
        ({}, False, "noncausal-self"),
        ({"alpha": (1.0, 2.0, 3.0)}, True, "3 numbers"),
        ({"min_span": 0}, True, "at least"),
    ],
)
def test_refused(knobs: dict[str, Any], causal: bool, match: str) -> None:
    q, k, v = problem()
    with pytest.raises(Refused, match=match):
        attention(q, k, v, "moa", causal=causal, **knobs)


# --- the search -------------------------------------------------------------------------------------------------------


def test_influence_is_the_change_when_a_weight_is_taken_away() -> None:
    """To first order: weights of size t at ij, row normalised again, change the loss by -t E_ij / P_ij or so."""
    q, k, v = (t.double() for t in problem(6, heads=1, batch=1))
    g = torch.randn(1, 1, 6, 8, dtype=torch.float64)
    found = influence(q, k, v, g, 8**-0.5, take_abs=False)[0, 0]
    weights = torch.softmax((q @ k.mT * 8**-0.5).masked_fill(~torch.ones(6, 6).tril().bool(), -math.inf), -1)[0, 0]
    for i, j in ((1, 0), (3, 2), (5, 5), (5, 1)):
        left = weights[i].clone()
        left[j] = 0
        change = (left / left.sum() - weights[i]) @ v[0, 0] @ g[0, 0, i]  # linear in the output: exact
        assert torch.allclose(found[i, j], change, atol=1e-12)
    assert torch.allclose((found * (1 - weights))[1:].sum(-1), torch.zeros(5, dtype=torch.float64), atol=1e-12)


def test_rules_and_tables() -> None:
    rules = grid([8, 16], [32], betas=5, interval=4)
    assert all(a + b * 8 > 0 and a + b * 16 <= 16 and a + b * 32 <= 32 for a, b in rules)
    spans = [a + b * 32 for a, b in rules]
    assert spans == sorted(spans) and (0.0, 1.0) in rules
    assert layout((4.0, 0.0), 4, 2).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]
    found = torch.rand(3, 8, 8)
    lost, kept = tables(found, rules, 2), costs(16, rules, 2)
    widths = [int(a // 2 + b * 8) for a, b in rules]
    order = sorted(range(len(rules)), key=lambda r: widths[r])
    assert bool((lost[:, order].diff(dim=1) <= 1e-9).all()), "wider loses less"
    assert bool((kept[order].diff() >= 0).all()), "wider keeps more"
    whole = rules.index((0.0, 1.0))
    assert float(lost[:, whole].abs().max()) == 0 and float(kept[whole]) == 16


@pytest.mark.parametrize("limit", [None, 1, 2])
def test_plans_are_those_of_brute_force(limit: int | None) -> None:
    draw = torch.Generator().manual_seed(4)
    lost = torch.rand(1, 2, 2, 3, generator=draw, dtype=torch.float64)
    kept = torch.tensor([[2.0, 5.0, 8.0]], dtype=torch.float64)
    (plan,) = choose(lost, kept, [18.0], lower_bound_ratio=0.5, rules_per_layer_limit=limit)
    best = math.inf
    for c in product(range(3), repeat=4):
        total = sum(float(kept[0, r]) for r in c)
        if 9 <= total <= 18 and (limit is None or all(len(set(c[at : at + 2])) <= limit for at in (0, 2))):
            best = min(best, sum(float(lost[0, at // 2, at % 2, r]) for at, r in enumerate(c)))
    assert abs(plan.losses[0] - best) < 1e-9
    assert plan.choice.shape == (2, 2)


def test_a_looser_bound_never_loses_more_and_no_plan_beats_another() -> None:
    draw = torch.Generator().manual_seed(5)
    lost = torch.rand(2, 2, 2, 4, generator=draw, dtype=torch.float64)
    kept = torch.tensor([[1.0, 2.0, 4.0, 8.0], [1.0, 4.0, 8.0, 16.0]], dtype=torch.float64)
    least = []
    for share in (8.0, 16.0, 32.0):
        plans = choose(lost, kept, [share, 2 * share], lower_bound_ratio=0.0, rules_per_layer_limit=None, points=3)
        least.append(min(plan.losses[0] for plan in plans))
        for a, b in product(plans, plans):
            assert a is b or not all(x <= y for x, y in zip(a.losses, b.losses, strict=True))
    assert least == sorted(least, reverse=True)


def test_the_search_ends_in_a_recipe_for_a_llama() -> None:
    torch.manual_seed(0)
    model = llama()
    calls = {n: [{"input_ids": ids(1, n)} for _ in range(2)] for n in (8, 16)}
    found = moa_search(
        model, calls, lambda out: out.logits.log_softmax(-1)[..., 0].mean(), densities=0.6, block_size=2, num_betas=5,
        alpha_interval=4, lower_bound_ratio=0.5, points_per_objective=3, min_span=2, max_new_tokens=0,
    )  # fmt: skip
    (site,) = found["sites"]
    knobs = site["attention"]["moa"]
    assert len(knobs["alpha"]) == 2, "one rule for each key head"
    spans = [a + b * 16 for a, b in zip(knobs["alpha"], knobs["beta"], strict=True)]
    assert sum(spans) / 2 <= 0.6 * 16
    assert all(t.grad is None for t in model.parameters())
    fast = reattend.optimize(model, found, {"input_ids": ids(2, 16)}, measure=False)
    assert (fast(input_ids=ids(2, 16)).logits).isfinite().all()


def test_a_layer_can_share_a_rule_and_influence_be_a_share() -> None:
    found = torch.rand(2, 3, 4, 4, dtype=torch.float64) * torch.tensor([1.0, 10, 100]).view(3, 1, 1)
    heads = [weighed(layer, by_head=True) for layer in found]
    layers = [weighed(layer, by_layer=True) for layer in found]
    assert all(
        torch.allclose(h.sum((1, 2)), torch.ones(3).double()) and float(h.sum()) == pytest.approx(3) for h in heads
    )
    assert all(float(one.sum()) == pytest.approx(1) for one in layers)
    assert torch.equal(weighed(found[0] * 0, by_head=True, by_layer=True), found[0] * 0)
    assert torch.equal(weighed(found[0], together=True), found[0].sum(0, keepdim=True))
    plan = moa_search(
        llama(), {8: [{"input_ids": ids(1, 8)}]}, lambda out: out.logits.log_softmax(-1)[..., 0].mean(), densities=0.6,
        block_size=2, num_betas=5, alpha_interval=4, lower_bound_ratio=0.2, same_per_layer=True,
        normalize_by_layer=True, min_span=2, max_new_tokens=0,
    )  # fmt: skip
    knobs = plan["sites"][0]["attention"]["moa"]
    assert isinstance(knobs["alpha"], float) and isinstance(knobs["beta"], float)
    assert knobs["alpha"] + knobs["beta"] * 8 <= 0.6 * 8
