"""`quality`: rows that repeat, outlive a kill and are measured once; what is refused, and the table, JSON and plot."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from quality_models import byte_llama, vit
from typer.testing import CliRunner

import reattend
from reattend import Refused, api
from reattend.cli import app
from reattend.compiler.recipe_load import load_recipe
from reattend.compiler.steps import vocabulary
from reattend.models.quality import fingerprint, harness, wish
from reattend.models.quality.language import language
from reattend.models.quality.plot import Axis
from reattend.models.quality.row import Record, Row


def everywhere(mechanism: str, **knobs: Any) -> dict[str, Any]:
    return {"version": 1, "sites": [{"match": "*", "attention": {mechanism: knobs}}]}


RECIPES = {"exact": "exact", "near": everywhere("window", window=8, sinks=0), "linear": everywhere("linear")}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fewer runs of timing, and a list of the rows that were judged."""
    seen: list[str] = []
    judge = harness.judged

    def noted(task: Any, model: Any, original: Any, tick: Any) -> Any:
        seen.append(type(model).__name__)
        return judge(task, model, original, tick)

    monkeypatch.setattr(harness, "RUNS", 1)
    monkeypatch.setattr(harness, "judged", noted)
    return seen


@pytest.fixture
def planted(quick: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Recipes that only disturb the weights: what is asked is which rows are measured, not what a rewrite does."""

    def disturbed(model: Any, recipe: Any, call: Any, **_: Any) -> Any:
        worse = copy.deepcopy(model)
        with torch.no_grad():
            worse.lm_head.weight.add_(0.1 * torch.randn_like(worse.lm_head.weight))
        return worse

    monkeypatch.setattr(api, "optimize", disturbed)
    return quick


@pytest.mark.slow
def test_rows_table_plot_and_json(quick: list[str], tmp_path: Path) -> None:
    model = byte_llama()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found = reattend.quality(model, RECIPES | {"agent": everywhere("agent")}, out=tmp_path, name="tiny")
    assert [row.name for row in found.rows] == ["original", "exact", "near", "linear", "agent"]
    original, exact, near, linear, agent = found.rows
    assert original.measures["kl"] == 0.0 and original.measures["top1"] == 1.0
    assert exact.kind == "exact" and exact.sites == (2, 2) and exact.measures["kl"] < 1e-9
    assert near.kind == "approximate" and near.measures["kl"] > 0 and near.predicted is not None and near.predicted < 1
    assert linear.untrained and not near.untrained and near.measured is not None and near.measured > 0
    assert (agent.status, agent.measures) == ("refused", {}) and "causal" in agent.reason
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())

    text = found.text()
    assert "3 measured, 1 refused" in text.splitlines()[0] and "UNTRAINED" in text and agent.reason in text
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["rows"][2]["measures"] == near.measures and plain["rows"][2]["predicted"] == near.predicted

    page = (tmp_path / "tiny.md").read_text()
    table = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(table) == 2 + 5 and len({line.count("|") for line in table}) == 1
    picture = (tmp_path / "tiny.svg").read_text()
    assert "prefers-color-scheme:dark" in picture and picture.count("http") == 1  # its own namespace
    numbers = ElementTree.fromstring(picture).findall(".//*[@class='number']")
    assert len(numbers) == 4 + 4  # what was measured, in both panels


@pytest.mark.slow
def test_two_runs_give_the_same_numbers(quick: list[str]) -> None:
    one, other = (reattend.quality(byte_llama(), {"near": RECIPES["near"]}) for _ in range(2))
    assert [row.measures for row in one.rows] == [row.measures for row in other.rows]
    assert [row.key for row in one.rows] == [row.key for row in other.rows] and len(quick) == 4


def test_a_killed_run_goes_on_where_it_stood(
    planted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = harness.judged

    def killed(*given: Any) -> Any:
        if len(planted) == 2:
            raise KeyboardInterrupt
        return noted(*given)

    monkeypatch.setattr(harness, "judged", killed)
    with pytest.raises(KeyboardInterrupt):
        reattend.quality(byte_llama(), RECIPES, out=tmp_path, name="tiny")
    kept = tmp_path / "tiny.jsonl"
    assert len(kept.read_text().splitlines()) == 2
    with kept.open("a") as file:
        file.write('{"name": "near", "key": "cut o')  # killed while it wrote
    monkeypatch.setattr(harness, "judged", noted)
    found = reattend.quality(byte_llama(), RECIPES, out=tmp_path, name="tiny")
    assert len(planted) == 4  # two before, two after
    assert [Row.of_json(line) for line in kept.read_text().splitlines()] == list(found.rows)


def test_rows_are_kept_while_they_hold(planted: list[str], tmp_path: Path) -> None:
    model = byte_llama()
    run = lambda recipes: reattend.quality(model, recipes, out=tmp_path, name="tiny")
    first = run({"near": RECIPES["near"]})
    assert len(planted) == 2
    assert run({"near": RECIPES["near"]}).rows == first.rows and len(planted) == 2
    run({"near": everywhere("window", window=9, sinks=0)})  # other knobs under the same name
    assert len(planted) == 3
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-3
    assert run({}).rows[0].key != first.rows[0].key and len(planted) == 4
    names = [json.loads(line)["name"] for line in (tmp_path / "tiny.jsonl").read_text().splitlines()]
    assert names == ["original", "near"]  # a row that was not asked for stays, older ones of the same name go


def test_whatever_decides_a_number_is_in_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    task, model = language(144), fingerprint.of_model(byte_llama())
    near, nearer = (load_recipe(everywhere("window", window=w), vocabulary()) for w in (8, 9))
    keys = [
        fingerprint.of_row(model, task, near),
        fingerprint.of_row(model, task, nearer),
        fingerprint.of_row(model, task, None),
        fingerprint.of_row(model, task, None, given="a trained model"),
        fingerprint.of_row("other weights", task, near),
        fingerprint.of_row(model, language(143), near),
        fingerprint.of_row(model, replace(task, settings={**task.settings, "definition": 0}), near),
    ]
    monkeypatch.setattr(fingerprint, "_source", lambda slug: f"{slug} written otherwise")
    keys.append(fingerprint.of_row(model, task, near))
    assert len(set(keys)) == len(keys)
    monkeypatch.undo()
    assert fingerprint.of_row(model, language(144), near) == keys[0]
    assert fingerprint.of_model(vit()) == fingerprint.of_model(vit()) != fingerprint.of_model(vit(23))


@pytest.mark.slow
def test_an_optimized_model_has_a_row_of_its_own(quick: list[str]) -> None:
    model = byte_llama()
    fast = reattend.optimize(
        model, RECIPES["near"], {"input_ids": torch.zeros(1, 144, dtype=torch.long)}, measure=False
    )
    given = reattend.quality(model, {"near": RECIPES["near"], "near, given": fast})
    assert given["near"].measures == given["near, given"].measures and given["near"].key != given["near, given"].key
    assert given["near, given"].sites == (2, 2) and given["near, given"].predicted is not None
    with torch.no_grad():
        fast.lm_head.weight.zero_()
    worse = reattend.quality(model, {"trained badly": fast})["trained badly"]
    assert worse.measures["bpb"] == pytest.approx(8.0) and worse.key != given["near, given"].key
    with pytest.raises(Refused, match="an optimized model"):
        reattend.quality(fast)


def test_a_mechanism_that_breaks_down_breaks_one_row(quick: list[str], notebook: None) -> None:
    from dataclasses import dataclass

    @reattend.register("bursts")
    @dataclass(frozen=True)
    class Bursts(reattend.Mechanism):
        """Gives no numbers."""

        kind = "approximate"

        def forward(self, site: Any, p: Any, q: Any, k: Any, v: Any) -> Any:
            return reattend.attend(q, k, v, site=site) / (q[:, :1, :1, :1] * 0)

    asked = {"bursts": everywhere("bursts") | {"verify": {"else": "warn"}}, "near": RECIPES["near"]}
    found = reattend.quality(byte_llama(), asked)
    assert found["bursts"].status != "measured" and found["bursts"].reason and found["near"].status == "measured"
    assert found["bursts"].measures == {}


def test_a_mechanism_by_name_is_measured_wherever_it_belongs(quick: list[str]) -> None:
    """Weights of 8 bits change a model without a site: a row all the same."""
    calls = [{"input_ids": torch.arange(12).view(1, -1) + n} for n in range(2)]
    found = reattend.quality(byte_llama(), ["w8", "sigmoid"], data=calls)
    assert [row.name for row in found.rows] == ["original", "w8", "sigmoid"]
    stored, sigmoid = found["w8"], found["sigmoid"]
    assert (stored.status, stored.kind, stored.sites) == ("measured", "approximate", (0, 2))
    assert 0 < stored.measures["kl"] < sigmoid.measures["kl"] and sigmoid.sites == (2, 2)


@pytest.mark.slow
def test_calls_of_ones_own(quick: list[str], tmp_path: Path) -> None:
    model = byte_llama()
    model.config.vocab_size = 255  # no byte model any more
    with pytest.raises(Refused, match=r"no task for a LlamaForCausalLM.*data="):
        reattend.quality(model, "exact")
    calls = [{"input_ids": torch.arange(20)[None] + shift} for shift in range(2)]
    found = reattend.quality(model, {"near": everywhere("window", window=3, sinks=0)}, data=calls)
    assert found.rows[0].measures == {"relative": 0.0, "cosine": 1.0, "kl": 0.0, "top1": 1.0}
    assert found["near"].measures["relative"] > 1e-4
    lines = tmp_path / "calls.jsonl"
    lines.write_text("".join(json.dumps({"input_ids": call["input_ids"][0].tolist()}) + "\n" for call in calls))
    assert reattend.quality(model, {"near": RECIPES["near"]}, data=lines).rows[0].key == found.rows[0].key
    with pytest.raises(Refused, match=r"on data\[1\]"):
        reattend.quality(model, "exact", data=[calls[0], {"pixels": torch.zeros(1, 3)}])
    with pytest.raises(Refused, match="data without a call"):
        reattend.quality(model, "exact", data=[])


def test_mistakes_are_named_before_any_work(quick: list[str]) -> None:
    model = byte_llama()
    for recipes, says in [
        ("windwo", "windwo"),
        (everywhere("windwo"), "did you mean 'window'"),
        ([model], "without a name"),
        ({"original": "exact"}, "two rows named 'original'"),
    ]:
        with pytest.raises(Refused, match=says):
            reattend.quality(model, recipes)
    with pytest.raises(Refused, match="task 'languages'.*did you mean 'language'"):
        reattend.quality(model, task="languages")
    with pytest.raises(Refused, match="train"):
        reattend.quality(byte_llama().train())
    assert quick == []
    with pytest.raises(Refused, match="LlamaForCausalLM on sentences"):
        reattend.quality(model, task=task_with_pixels())


def task_with_pixels() -> Any:
    task = language(144)
    part = replace(task.parts[0], calls=(((), {"pixels": torch.zeros(1)}),))
    return replace(task, name="sentences", make=lambda: (part,))


def test_every_mechanism_has_a_row() -> None:
    found = wish.wished((), True, vocabulary())
    named = {name.split(" ")[0] for name in (one.name for one in found)}
    assert named == {"exact", *reattend.mechanisms()} and len({one.name for one in found}) == len(found)
    assert "window window=64 sinks=0" in [one.name for one in found]
    assert all(one.recipe is not None or one.refused for one in found)
    asked = wish.wished(["exact"], True, vocabulary())
    assert [one.name for one in asked] == [one.name for one in found]  # not twice


def test_a_file_without_a_last_line_end_is_continued(tmp_path: Path) -> None:
    record = Record(tmp_path / "rows.jsonl")
    record.add(Row("a", "1"))
    (tmp_path / "rows.jsonl").write_text((tmp_path / "rows.jsonl").read_text() + '{"na')
    Record(tmp_path / "rows.jsonl").add(Row("b", "2"))
    again = Record(tmp_path / "rows.jsonl")
    assert again.find("1") == Row("a", "1") and again.find("2") == Row("b", "2") and again.find("3") is None


def test_axes_hold_their_ticks_and_what_lies_beyond() -> None:
    axis = Axis(1.0, 100.0, 0.0, 200.0, log=True)
    assert axis(10.0) == pytest.approx(100.0) and axis(1e9) == 200.0
    assert axis.ticks() == [1, 2, 5, 10, 20, 50, 100]
    assert Axis(0.0, 1.0, 0.0, 1.0, log=False).ticks() == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert Axis(0.9, 1.1, 0.0, 1.0, log=True).ticks() == pytest.approx([0.9, 0.95, 1.0, 1.05, 1.1])


def test_the_command_line(planted: list[str], tmp_path: Path) -> None:
    run = lambda *more: CliRunner().invoke(app, ["quality", "--model", "py:quality_models:byte_llama", *more])
    recipe = tmp_path / "near.yaml"
    recipe.write_text("version: 1\nsites:\n  - {match: '*', attention: {window: {window: 8}}}\n")
    result = run("--recipe", str(recipe), "--out", str(tmp_path / "out"), "--json")
    assert result.exit_code == 0, result.output
    assert [row["name"] for row in json.loads(result.stdout)["rows"]] == ["original", "near"]
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == [f"py_quality_models_byte_llama{ending}" for ending in (".jsonl", ".md", ".svg")]
    assert run("--recipe", "windwo").exit_code == 1
    assert run("--data", str(tmp_path / "missing.jsonl")).exit_code == 1


def test_the_command_line_fails_where_nothing_was_measured(quick: list[str]) -> None:
    refused = CliRunner().invoke(app, ["quality", "--model", "py:quality_models:byte_llama", "--recipe", "agent"])
    assert refused.exit_code == 1 and "agent: refused" in refused.stdout and "causal" in refused.stdout


@pytest.mark.slow
def test_all_mechanisms_on_a_tiny_model(quick: list[str]) -> None:
    found = reattend.quality(byte_llama(), every=True)
    assert {row.status for row in found.rows} <= {"measured", "refused"}, found.text()
    assert found["exact"].measures["kl"] < 1e-9
