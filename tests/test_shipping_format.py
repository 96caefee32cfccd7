"""A graph file admits operators, leaf modules and tensors of the model, and nothing else: foreign names are refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reattend
from reattend.compiler.refusal import Refused
from reattend.compiler.shipping.graph_json import graph_json, graph_of, operator_of, value_json, value_of
from reattend.compiler.shipping.signature_json import arithmetic

WINDOW = {"version": 1, "sites": [{"match": "*", "attention": {"window": {"window": 3, "sinks": 1}}}]}


class Attending(nn.Module):
    """One causal attention, the weights of its query and key projections tied."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))
        self.k_proj.weight = self.q_proj.weight
        self.register_buffer("shift", torch.arange(16.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.shift
        q, k, v = (p(x).unflatten(-1, (2, 8)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    fast = reattend.optimize(Attending().eval(), WINDOW, (torch.randn(2, 9, 16),), measure=False)
    return reattend.save(fast, tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def facts(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "reattend.json").read_text())
    return found


def loaded_with(facts: dict[str, Any], folder: Path, tmp_path: Path) -> Any:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "reattend.json").write_text(json.dumps(facts))
    return reattend.load(tmp_path, model=Attending())


def nodes_of(facts: dict[str, Any], op: str) -> list[dict[str, Any]]:
    return [n for n in facts["signatures"][0]["graph"] if n["op"] == op]


def test_saved_and_loaded_it_computes_the_same(folder: Path) -> None:
    torch.manual_seed(0)
    fast = reattend.optimize(Attending().eval(), WINDOW, (torch.randn(2, 9, 16),), measure=False)
    again = reattend.load(folder, model=Attending())
    x = torch.randn(3, 12, 16)
    torch.testing.assert_close(again(x), fast(x), rtol=0, atol=0)
    assert len(again.signatures) == 1, "the saved graph serves the call"
    assert again.q_proj.weight is again.k_proj.weight
    assert again.report.verdict() == fast.report.verdict()
    assert str(again.sites) == str(fast.sites)
    torch.testing.assert_close(again(x[:, :1]), fast(x[:, :1]), rtol=0, atol=0)  # a size of 1 is asked about


def test_a_graph_is_the_same_after_writing_it_twice(folder: Path, facts: dict[str, Any]) -> None:
    again = reattend.load(folder, model=Attending())
    assert graph_json(graph_of(facts["signatures"][0]["graph"], again)) == facts["signatures"][0]["graph"]


@pytest.mark.parametrize(
    "value", [None, True, 3, 0.1, float("inf"), "text", [1, (2, None)], slice(0, None, 2), 1j, torch.bfloat16,
              torch.strided, torch.channels_last, torch.device("cuda:1")], ids=str)  # fmt: skip
def test_values_come_back(value: Any) -> None:
    assert value_of(json.loads(json.dumps(value_json(value, "n"))), {}) == value


@pytest.mark.parametrize(
    "name", ["os.system.default", "python.eval", "aten.linear", "aten.__class__.__init__", "aten.linear.__class__",
             "prim.Print.default", "aten.from_file.default", "builtins.getattr.default", 3, None, "aten.nothing.more"],
    ids=str)  # fmt: skip
def test_foreign_operators_are_refused_by_name(name: Any) -> None:
    with pytest.raises(Refused, match=f"operator '?{name}"):
        operator_of(name)


@pytest.mark.parametrize("text", ["__import__('os').system('id')", "s0.__class__", "(lambda: 1)()", "s0 ** 99", "[1]",
                                  "s0 if s0 else 1", "max(s0, key=s0)", "open", "9" * 400, "(" * 500, 3])  # fmt: skip
def test_conditions_are_arithmetic_or_refused(text: Any) -> None:
    with pytest.raises(Refused, match="condition on sizes"):
        arithmetic(text, {"s0"})


def test_a_newer_version_is_refused_by_name(facts: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="format version 2.*reads version 1; upgrade"):
        loaded_with(facts | {"version": 2}, folder, tmp_path)


@pytest.mark.parametrize("text", ["", "{", '{"format": "reattend", "version": 1', "[]", '{"version": 1}', "[" * 100_000,
                                  '{"format": "reattend", "version": 1}', '{"a": NaN}'])  # fmt: skip
def test_a_file_that_is_none_of_ours_is_one_line(text: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "reattend.json").write_text(text)
    with pytest.raises(Refused) as said:
        reattend.load(tmp_path, model=Attending())
    assert "\n" not in str(said.value)
    assert "reattend.json" in str(said.value)


def test_an_empty_folder_and_cut_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"no reattend\.json"):
        reattend.load(tmp_path, model=Attending())
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:50])
    with pytest.raises(Refused, match=r"model\.safetensors: cannot be read"):
        reattend.load(tmp_path, model=Attending())


def test_a_recipe_in_a_folder_includes_no_other_file(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "recipe.yaml").write_text("version: 1\ninclude: [../elsewhere.yaml]\n")
    (tmp_path.parent / "elsewhere.yaml").write_text("version: 1\n")
    with pytest.raises(Refused, match=r"include '\.\./elsewhere\.yaml': a recipe in one file"):
        reattend.load(tmp_path, model=Attending())


def test_without_a_model_a_class_of_ones_own_is_refused(folder: Path) -> None:
    with pytest.raises(Refused, match=r"Attending, which transformers does not ship.*model=instance"):
        reattend.load(folder)


@pytest.mark.parametrize(
    ("op", "key", "bad"),
    [
        ("call_module", "target", "elsewhere"),
        ("call_module", "target", "q_proj.__class__"),
        ("call_module", "target", "../q_proj"),
        ("call_module", "target", ""),
        ("get_attr", "target", "__class__"),
        ("get_attr", "target", "q_proj.forward"),
        ("get_attr", "target", "q_proj.weight.data"),
        ("get_attr", "target", 'a"]);import os;('),
        ("placeholder", "target", "x=print(1)"),
        ("placeholder", "name", "lambda"),
        ("call_function", "target", "os.system.default"),
        ("call_function", "args", [{"node": "nowhere"}]),
        ("call_function", "args", [{"dtype": "load"}]),
        ("call_function", "kwargs", {"a=print(1),b": 1}),
        ("call_function", "op", "call_method"),
    ],
    ids=str,
)
def test_what_is_not_in_the_model_is_refused(
    op: str, key: str, bad: Any, facts: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    changed = copy.deepcopy(facts)
    nodes_of(changed, op)[0][key] = bad
    with pytest.raises(Refused) as said:
        loaded_with(changed, folder, tmp_path)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f["signatures"][0]["output"].update(kind="fields", type="subprocess.Popen"),
        lambda f: f["signatures"][0]["output"].update(kind="object", type="builtins.list"),
        lambda f: f["signatures"][0]["graph"].pop(),
        lambda f: f["signatures"][0].pop("sizes"),
        lambda f: f["signatures"][0]["sizes"]["guards"].append("__import__('os')"),
        lambda f: f["new"].update({"q_proj.weight": "parameter"}),
        lambda f: f.update(recipes="../../recipe"),
        lambda f: f.update(signatures=[{}] * 1000),
        lambda f: f["report"]["rows"][0].pop("site"),
        lambda f: f["settled"].pop("changed"),
    ],
)
def test_what_is_not_whole_is_refused(change: Any, facts: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    changed = copy.deepcopy(facts)
    change(changed)
    with pytest.raises(Refused) as said:
        loaded_with(changed, folder, tmp_path)
    assert "\n" not in str(said.value)


def test_weights_of_another_model_are_refused(folder: Path) -> None:
    other = Attending()
    other.v_proj = nn.Linear(16, 24)
    with pytest.raises(Refused, match=r"v_proj\.\w+ is \(16.*the given model has \(24"):
        reattend.load(folder, model=other)
