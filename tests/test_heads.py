"""Head analysis against the cards' own answers: closed forms, hand-built heads, finite differences, and its recipes."""

from __future__ import annotations

import csv
import doctest
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import Stack, stack
from torch import Tensor, nn
from typer.testing import CliRunner

import reattend
from reattend import Refused
from reattend.cli import app
from reattend.compiler.heads.blocks import block_influence, entry_influence, loss_outside
from reattend.compiler.heads.influence import sample_influence
from reattend.compiler.heads.losses import next_token
from reattend.compiler.heads.measures import Mean, distance, echo, entropy, induction, sink
from reattend.compiler.heads.plan import best, spans
from reattend.compiler.heads.rank import arank
from reattend.compiler.heads.reading import Reading, Seen
from reattend.compiler.heads.repeats import Repeats
from reattend.compiler.heads.rows import weight_rows
from reattend.compiler.heads.table import HeadTable, table_of
from reattend.compiler.primitives.attend_meaning import attend_meaning
from reattend.compiler.primitives.attend_spec import AttendSpec
from reattend.compiler.site import Grid, Site
from reattend.compiler.symbol_text import parse

CAUSAL = AttendSpec(score="s * 0.25", keep="j <= i")


def site(heads: int = 2, kv_heads: int = 2, pattern: str = "causal-self", **facts: Any) -> Site:
    return Site("a", 0, heads, kv_heads, 4, 4, 0.25, pattern, **facts)


def seen(n: int, spec: AttendSpec = CAUSAL, *, level: bool = False, **facts: Any) -> Seen:
    q, k, v = torch.randn(3, 2, 2, n, 4)
    return Seen(site(**facts), spec, 0 * q if level else q, k, v)


def mean(of: Seen, measure: Any, budget: int = 1 << 20) -> list[float]:
    found = Mean()
    for rows in weight_rows(of, budget):
        found.add(measure(rows), rows.real)
    return found.value().tolist()


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "tables"),
    [
        (CAUSAL, ()),
        (AttendSpec(score="s * 0.25 + t0[h, i, j]", keep="j <= i"), (torch.randn(2, 9, 9),)),
        (AttendSpec(score="s", keep="(j <= i) & (t0[b, j] != 0)"), (torch.tensor([[0] * 2 + [1] * 7, [1] * 9]),)),
        (AttendSpec(score="s", keep="i <= j + 2", sink="t0[h]"), (torch.randn(2),)),
        (AttendSpec(score="s", keep="j <= N"), ()),
    ],
)
def test_rows_in_chunks_are_the_rows_of_the_whole(spec: AttendSpec, tables: tuple[Tensor, ...]) -> None:
    q, k, v = torch.randn(3, 2, 2, 9, 4)
    one = Seen(site(), spec, q, k, v, tables)
    (whole,) = attend_meaning(
        [[q], [k, v], tables], reattend.compiler.heads.rows.replace(spec, outputs=("weights",)).text
    )
    parts = list(weight_rows(one, budget=2 * 2 * 9 * 2))
    assert torch.equal(torch.cat([p.weights for p in parts], 2), whole)
    assert len(parts) == (1 if "N" in spec.keep else 5), "two rows at a time"
    assert all(p.weights.numel() <= 2 * 2 * 9 * 2 for p in parts) or "N" in spec.keep


def test_queries_that_stand_at_the_end_know_where() -> None:
    q, k, v = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 8, 4), torch.randn(2, 2, 8, 4)
    one = Seen(site(), AttendSpec(score="s", keep="j <= i", align="end"), q, k, v)
    last = [rows.weights for rows in weight_rows(one, budget=1)]
    assert [int((w > 0).sum(-1).max()) for w in last] == [6, 7, 8]
    assert [int(rows.i[0]) for rows in weight_rows(one, budget=1)] == [5, 6, 7]


# --- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 1 << 20])
def test_uniform_causal_attention_has_closed_forms(budget: int) -> None:
    n, block = 12, 4
    one = seen(n, level=True)
    assert mean(one, entropy, budget) == pytest.approx([sum(math.log(i + 1) for i in range(n)) / n] * 2)
    assert mean(one, sink, budget) == pytest.approx([sum(1 / (i + 1) for i in range(n)) / n] * 2)
    assert mean(one, distance, budget) == pytest.approx([sum(i / 2 for i in range(n)) / n] * 2)
    copies = [(i // block) / (i + 1) for i in range(block, n)]  # of the own token, before it
    assert mean(one, echo(block), budget) == pytest.approx([sum(copies) / len(copies)] * 2)
    # as many stand behind a copy: the first key stands behind nothing
    assert mean(one, induction(block), budget) == pytest.approx([sum(copies) / len(copies)] * 2)
    assert arank(one, budget).tolist() == [[n - 1.0] * 2] * 2


def test_rank_without_the_diagonal() -> None:
    sharp = Seen(site(), AttendSpec(score="s", keep="i == j"), *torch.randn(3, 1, 2, 6, 4))
    assert arank(sharp).tolist() == [[0.0, 0.0]], "a head that looks at itself alone"
    same = Seen(
        site(pattern="noncausal-self"), AttendSpec(score="s"), torch.zeros(1, 2, 6, 4), *torch.randn(2, 1, 2, 6, 4)
    )
    assert arank(same).tolist() == [[1.0, 1.0]], "all rows equal"


def test_distance_on_a_grid_is_between_patches() -> None:
    grid = Grid(2, 3, prefix=1)
    one = seen(7, AttendSpec(score="s"), level=True, pattern="noncausal-self", grid=grid)
    places = [(y, x) for y in range(2) for x in range(3)]
    wanted = sum(math.dist(a, b) for a in places for b in places) / 36
    assert mean(one, distance) == pytest.approx([wanted] * 2)
    assert mean(one, sink) == pytest.approx([1 / 7] * 2)


def test_padding_does_not_count() -> None:
    q, k, v = torch.randn(3, 2, 2, 6, 4)
    real = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    condition = "t0[b, j] != 0"
    spec = AttendSpec(score="s", keep=condition)
    one = Seen(site(pattern="noncausal-self"), spec, q, k, v, (real,), parse(condition))
    short = Seen(site(pattern="noncausal-self"), AttendSpec(score="s"), q[:1, :, :4], k[:1, :, :4], v[:1, :, :4])
    other = Seen(site(pattern="noncausal-self"), AttendSpec(score="s"), q[1:], k[1:], v[1:])
    expected = [(4 * a + 6 * b) / 10 for a, b in zip(mean(short, entropy), mean(other, entropy))]
    assert mean(one, entropy) == pytest.approx(expected)


# --- hand-built heads -------------------------------------------------------------------------------------------------


class Copier(nn.Module):
    """Head 0 looks behind earlier copies of the token, head 1 everywhere alike; head 0 decides the answer."""

    def __init__(self, vocabulary: int = 300) -> None:
        super().__init__()
        self.register_buffer("table", torch.eye(vocabulary))

    def forward(self, input_ids: Tensor) -> Tensor:
        own = F.embedding(input_ids, self.table)  # (B, N, V)
        before = F.pad(own, (0, 0, 1, 0))[:, :-1]
        q = torch.stack([40 * self.table.shape[0] ** 0.5 * own, 0 * own], 1)
        k = torch.stack([before, before], 1)
        v = torch.stack([10 * own, 0 * own], 1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).sum(1)


def copied(n: int = 12, samples: int = 2) -> Tensor:
    return torch.stack([torch.randperm(300)[:n] for _ in range(samples)]).repeat(1, 2)


COPIER = ""  # the path of its site: the model itself


def test_a_hand_built_induction_head_gets_the_maximum() -> None:
    ids = copied()
    table = reattend.heads(
        Copier(), {"input_ids": ids}, measures=["induction", "echo"], repeats={"block": 12, "times": 2}
    )
    assert table.value(COPIER, 0, "induction") == pytest.approx(1, abs=1e-3)
    assert table.value(COPIER, 0, "echo") == pytest.approx(0, abs=1e-3)
    uniform = [1 / (i + 1) for i in range(12, 24)]
    assert table.value(COPIER, 1, "echo") == pytest.approx(sum(uniform) / 12)
    assert table.ranked("induction")[0].head == 0
    assert "2 rows of 12 random tokens 2 times" in table.text()


def test_retrieval_is_one_on_copies_and_none_on_random_tokens() -> None:
    ids = copied()
    sources = [(b, 12 + t, t + 1) for b in range(2) for t in range(11)]
    table = reattend.heads(Copier(), {"input_ids": ids}, measures="retrieval", sources=sources)
    assert [h.values["retrieval"] for h in table] == [1.0, 0.0]
    other = torch.stack([torch.randperm(300)[:24] for _ in range(2)])
    table = reattend.heads(Copier(), {"input_ids": other}, measures="retrieval", sources=sources)
    assert [h.values["retrieval"] for h in table] == [0.0, 0.0], "no token stands at its source"


def test_influence_is_where_the_answer_comes_from() -> None:
    ids = copied()
    for mode in ("uniform", "zero"):
        table = reattend.heads(Copier(), {"input_ids": ids}, measures=["influence"], mode=mode)
        first, second = (h.values["influence"] for h in table)
        assert first > 0.2
        assert second == pytest.approx(0, abs=1e-6), "uniform already, and it adds nothing"


def test_influence_of_samples() -> None:
    ids = copied(samples=3)
    reading = Reading.of(Copier(), (), {"input_ids": ids})
    none = sample_influence(reading, ((), {"input_ids": ids}), {COPIER: []})
    assert none.tolist() == [0, 0, 0]
    some = sample_influence(reading, ((), {"input_ids": ids}), {COPIER: [0]})
    turned = sample_influence(reading, ((), {"input_ids": ids.flip(0)}), {COPIER: [0]})
    torch.testing.assert_close(some.flip(0), turned)
    with pytest.raises(Refused, match=r"head 2.*heads 0\.\.1"):
        sample_influence(reading, ((), {"input_ids": ids}), {COPIER: [2]})


# --- interventions ----------------------------------------------------------------------------------------------------


class NoAttention(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer.attn.o_proj.bias
            x = x + layer.mlp(layer.norm2(x))
        return x


def test_all_heads_taken_out_is_the_model_without_attention() -> None:
    model, x = stack(1), torch.randn(2, 7, 32)
    bare = NoAttention(1)
    bare.load_state_dict(model.state_dict())
    every = {s.path: dict.fromkeys(range(s.heads), 0.0) for s in reattend.sites(model, (x,))}
    with torch.no_grad():
        torch.testing.assert_close(reattend.intervene(model, (x,), scale=every), bare(x))
        torch.testing.assert_close(reattend.intervene(model, (x,), scale={p: {0: 1.0} for p in every}), model(x))


def test_heads_of_another_input() -> None:
    model, x, other = stack(1), torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    (path,) = (s.path for s in reattend.sites(model, (x,)))
    with torch.no_grad():
        torch.testing.assert_close(reattend.intervene(model, (x,), patch=((x,), {path: [0, 3]})), model(x))
        patched = reattend.intervene(model, (x,), patch=((other,), {path: range(4)}))
        block = model.layers[0]
        y = x + block.attn(block.norm1(other))
        torch.testing.assert_close(patched, y + block.mlp(block.norm2(y)))
    with pytest.raises(Refused, match="inputs of equal sizes"):
        reattend.intervene(model, (x,), patch=((other[:, :5],), {path: [0]}))


def test_uniform_heads_average_what_they_may_see() -> None:
    model, x = stack(1), torch.randn(2, 7, 32)
    (path,) = (s.path for s in reattend.sites(model, (x,)))
    with torch.no_grad():
        got = reattend.intervene(model, (x,), uniform={path: range(4)})
        block = model.layers[0]
        v = block.attn.v_proj(block.norm1(x)).view(2, 7, 2, 8)
        seen_so_far = v.cumsum(1) / torch.arange(1, 8).view(1, -1, 1, 1)
        o = seen_so_far.repeat_interleave(2, 2).reshape(2, 7, 32)
        y = x + block.attn.o_proj(o)
        torch.testing.assert_close(got, y + block.mlp(block.norm2(y)))


def test_a_masked_key_stays_masked_where_scores_are_level() -> None:
    from reattend.compiler.heads.interventions import uniform

    bias = torch.zeros(2, 5, 5).index_fill(2, torch.tensor([1]), -math.inf)
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    spec = AttendSpec(score="s + t0[h, i, j]", keep="j <= i")
    o = uniform([0])(torch.zeros(1, 2, 5, 4), (q, (k, v), [bias], spec.text))
    torch.testing.assert_close(o[0, 0, 4], v[0, 0, [0, 2, 3, 4]].mean(0))
    assert bool((o[0, 1] == 0).all()), "the other head is left alone"


# --- gradients --------------------------------------------------------------------------------------------------------


def test_entry_influence_is_the_change_of_a_linear_loss() -> None:
    """A loss that is linear in o changes by exactly -E when an entry is removed and its row scaled up again."""
    one = seen(6)
    gradient = torch.randn(2, 2, 6, 4)
    ((rows, change),) = entry_influence(one, gradient)
    p = rows.weights.double()

    def loss(weights: Tensor) -> Tensor:
        return ((weights @ one.v.double()) * gradient).sum((-2, -1))

    for i, j in ((1, 0), (3, 2), (5, 5)):
        removed = p.clone()
        removed[:, :, i, j] = 0
        removed[:, :, i] /= removed[:, :, i].sum(-1, keepdim=True)
        torch.testing.assert_close(change[:, :, i, j].double(), loss(removed) - loss(p), atol=1e-5, rtol=1e-4)
    signed = (change.double() * (1 - p)).sum(-1)[:, :, 1:]
    torch.testing.assert_close(signed, torch.zeros_like(signed), atol=1e-5, rtol=0)


def test_gradients_reach_a_site_through_those_behind_it() -> None:
    model, x = stack(2), torch.randn(2, 6, 32)
    path = reattend.sites(model, (x,))[0].path

    def loss(output: Any, given: Any) -> Tensor:
        return output.square().mean((1, 2))

    from reattend.compiler.heads.blocks import _with_gradients

    reading = Reading.of(model, (x,), {})
    found = {one.site.path: (one, g) for one, g in _with_gradients(reading, ((x,), {}), loss)}
    one, gradient = found[path]
    (rows,) = weight_rows(one)
    o = rows.weights @ one.v.repeat_interleave(2, 1)
    slope = (gradient * o).sum((0, 2, 3))[1]
    with torch.no_grad():
        up, down = (loss(reattend.intervene(model, (x,), scale={path: {1: f}}), {}).sum() for f in (1.01, 0.99))
    torch.testing.assert_close(slope, (up - down) / 0.02, atol=1e-4, rtol=1e-2)


def test_a_wider_window_loses_less() -> None:
    model, x = stack(2), torch.randn(2, 20, 32)
    blocks = block_influence(
        Reading.of(model, (x,), {}), ((x,), {}), loss=lambda o, _: o.square().mean((1, 2)), block=4
    )
    for found in blocks.values():
        assert found.shape == (4, 5, 5) and bool((found.triu(1) == 0).all())
        lost = torch.stack([loss_outside(found, w) for w in range(1, 6)])
        assert bool((lost.diff(dim=0) <= 0).all()) and bool((lost[-1] == 0).all()) and bool((lost[0] > 0).all())


def test_a_loss_that_nothing_moves_is_refused() -> None:
    model, x = stack(1), torch.randn(2, 6, 32)
    with pytest.raises(Refused, match="does not depend on any site"):
        reattend.heads(model, (x,), measures=["far"], loss=lambda output, given: torch.zeros(2))
    with pytest.raises(Refused, match="no loss is known"):
        reattend.heads(model, (x,), measures=["influence"])


# --- the table and the plan -------------------------------------------------------------------------------------------


def table() -> HeadTable:
    sites = tuple(Site(f"layers.{n}.attn", n, 4, 2, 8, 8, 0.35, "causal-self") for n in range(2))
    values = {"layers.0.attn": [0.1, 0.9, 0.2, 0.3], "layers.1.attn": [0.4, 0.5, 0.0, math.nan]}
    return table_of("toy", sites, {"induction": values, "distance": {p: [1, 2, 3, 4] for p in values}}, ["a note"])


def test_the_table_prints() -> None:
    lines = table().text().splitlines()
    assert lines[0] == "toy: 8 heads at 2 sites" and lines[-1] == "a note"
    assert lines[1].split() == ["site", "head", "kv", "induction", "distance"]
    assert lines[3].split() == ["layers.0.attn", "1", "0", "0.9", "2"] and lines[9].split()[3] == "-"
    facts = json.loads(table().json())
    assert facts["heads"][7] == {"site": "layers.1.attn", "head": 3, "kv_head": 1, "induction": None, "distance": 4.0}
    rows = list(csv.DictReader(io.StringIO(table().csv())))
    assert rows[1]["induction"] == "0.9" and rows[7]["induction"] == "" and len(rows) == 8


def test_groups_that_share_keys_count_as_their_largest_head() -> None:
    assert best(table(), "induction", 0.25) == {("layers.0.attn", 0)}
    assert best(table(), "induction", 0.5) == {("layers.0.attn", 0), ("layers.1.attn", 0)}
    assert best(table(), "-induction", 0.25) == {("layers.1.attn", 1)}
    assert best(table(), "distance", 0.5) == {("layers.0.attn", 1), ("layers.1.attn", 1)}


def test_a_plan_is_a_recipe() -> None:
    recipe = reattend.plan(table(), {"induction": 0.25, "-induction": 0.25}, {"window": {"window": 8, "sinks": 1}})
    assert recipe.text() == (
        "version: 1\n"
        "sites:\n"
        "  - match: layers.0.attn\n"
        "    attention: {split: {2-3: {window: {sinks: 1, window: 8}}, rest: keep}}\n"
        "  - match: layers.1.attn\n"
        "    attention: {split: {0-1: {window: {sinks: 1, window: 8}}, rest: keep}}\n"
    )
    all_of_a_site = reattend.plan(table(), {"induction": 0.25})
    assert all_of_a_site.text().splitlines()[-1] == "    attention: window"
    assert reattend.plan(table(), {}).text().count("attention: window") == 2


def test_plans_that_cannot_be() -> None:
    with pytest.raises(Refused, match="every head is kept"):
        reattend.plan(table(), {"distance": 1.0})
    with pytest.raises(Refused, match=r"measure 'inductoin'.*did you mean 'induction'"):
        reattend.plan(table(), {"inductoin": 0.5})
    with pytest.raises(Refused, match="a share of the heads"):
        reattend.plan(table(), {"distance": 14})
    with pytest.raises(Refused, match=r"windw.*did you mean 'window'"):
        reattend.plan(table(), {"distance": 0.5}, "windw")


def test_a_plan_from_a_model_is_what_optimize_does() -> None:
    model, x = stack(2), torch.randn(2, 12, 32)
    measured = reattend.heads(model, (x,), measures=["distance"])
    assert len(measured) == 8 and measured[5].kv_head == 0
    recipe = reattend.plan(measured, {"distance": 0.25}, {"window": {"window": 3, "sinks": 1}})
    fast = reattend.optimize(model, recipe, (x,), measure=False)
    kept = best(measured, "distance", 0.25)
    assert len(kept) == 1 and [row.status for row in fast.report.rows] == ["rewritten", "rewritten"]
    ((path, group),) = kept
    assert f"keep[{2 * group}-{2 * group + 1}]" in str(fast.sites[path].mechanism) or "softmax" in str(
        fast.sites[path].mechanism
    )
    again = reattend.heads(model, (x,), measures=["distance"])
    assert again.json() == measured.json()


def test_spans() -> None:
    assert spans([3]) == "3" and spans([0, 1, 4, 5, 6, 9]) == "0-1,4-6,9"


def test_several_calls_count_as_one() -> None:
    model, x = stack(1), torch.randn(4, 9, 32)
    whole = reattend.heads(model, (x,), measures=["entropy", "sink", "distance", "arank"])
    parts = reattend.heads(model, [(x[:2],), (x[2:],)], measures=["entropy", "sink", "distance", "arank"])
    for a, b in zip(whole, parts):
        assert list(a.values.values()) == pytest.approx(list(b.values.values()))


def test_bad_questions() -> None:
    model, x = stack(1), torch.randn(2, 9, 32)
    with pytest.raises(Refused, match=r"measure 'entrpy'.*did you mean 'entropy'"):
        reattend.heads(model, (x,), measures=["entrpy"])
    with pytest.raises(Refused, match="a model of token ids"):
        reattend.heads(model, (x,), measures=["echo"])
    with pytest.raises(Refused, match="retrieval without known sources"):
        reattend.heads(model, (x,), measures=["retrieval"])
    with pytest.raises(Refused, match=r"mode 'off'.*zero, uniform|mode 'off'"):
        reattend.heads(model, (x,), measures=["influence"], mode="off", loss=lambda o, _: o.square().mean())
    with pytest.raises(Refused, match="no attention found"):
        reattend.heads(nn.Sequential(nn.Linear(4, 4)), (torch.randn(2, 3, 4),))
    with pytest.raises(Refused, match="in a context of 100"):
        Repeats(block=64, times=4).ids(50, context=100)


def test_the_next_token_is_judged_without_padding() -> None:
    logits = torch.randn(2, 5, 20)
    ids = torch.randint(0, 20, (2, 5))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    got = next_token((logits,), {"input_ids": ids, "attention_mask": mask})
    assert got[0] == pytest.approx(F.cross_entropy(logits[0, :2], ids[0, 1:3]).item())


# --- the command line -------------------------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_heads_and_plan_on_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "heads.csv"
    result = run("heads", "nanogpt", "--measures", "entropy,distance", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert result.output.startswith("nanogpt: ") and out.read_text().startswith("site,head,kv_head,entropy,distance\n")
    recipe = tmp_path / "recipe.yaml"
    result = run(
        "plan", "nanogpt", "--heads", "distance=0.5", "--set", "window=4", "--set", "sinks=0", "--out", str(recipe)
    )
    assert result.exit_code == 0, result.output
    assert recipe.read_text().startswith("# heads of nanogpt kept by distance=0.5\nversion: 1\n")
    assert run("recipe", "check", str(recipe)).exit_code == 0
    assert "window" in run("optimize", "nanogpt", str(recipe)).output
    for arguments, says in (
        (("heads", "nanogpt", "--measures", "entrpy"), "did you mean 'entropy'"),
        (("heads", "nanogpt", "--out", "heads.xls"), ".csv, .json or .txt"),
        (("plan", "nanogpt", "--heads", "distance"), "MEASURE=SHARE"),
    ):
        failed = run(*arguments)
        assert failed.exit_code == 1 and says in failed.output


def test_the_page_on_heads_runs() -> None:
    page = Path(reattend.__file__).resolve().parent / "docs" / "heads.md"
    found = doctest.testfile(str(page), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert found.attempted > 15 and found.failed == 0
