"""Retrieval and streaming heads: gates mix the two, `classify` makes a recipe of them, a llama runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
import yaml
from torch import Tensor

import reattend
from reattend.compiler.functional import attention, attention_and_aux
from reattend.compiler.problem import problem
from reattend.compiler.refusal import Refused
from reattend.passes.kv.duo import Duo, classify, gates_of


def head(q: Tensor, k: Tensor, v: Tensor, keys: list[list[int]]) -> Tensor:
    """One head, row by row over the keys that it sees."""
    rows = [torch.softmax(k[seen] @ q[i] / q.shape[-1] ** 0.5, 0) @ v[seen] for i, seen in enumerate(keys)]
    return torch.stack(rows)


@pytest.mark.parametrize("threshold", [None, 0.5])
@pytest.mark.parametrize(("sink", "recent"), [(1, 3), (0, 1), (2, 20)])
def test_it_is_its_formula(threshold: float | None, sink: int, recent: int) -> None:
    q, k, v = problem(9, kv_heads=2, dtype=torch.float64)
    gate = torch.tensor([1.3, 0.25], dtype=torch.float64)
    m = Duo(sink, recent, threshold=threshold)
    full = [list(range(i + 1)) for i in range(9)]
    near = [[j for j in range(i + 1) if j < sink or i - j < recent] for i in range(9)]
    got = attention(*(t.float() for t in (q, k, v)), m, causal=True, params={"gate": gate.float()})
    for b in range(2):
        for h in range(4):
            g = h // 2
            a = min(float(gate[g]), 1.0) if threshold is None else float(gate[g] >= threshold)
            expected = a * head(q[b, h], k[b, g], v[b, g], full) + (1 - a) * head(q[b, h], k[b, g], v[b, g], near)
            assert torch.allclose(got[b, h].double(), expected, atol=1e-5)


def test_the_loss_is_the_mean_gate() -> None:
    q, k, v = problem(5, kv_heads=2)
    gate = torch.tensor([0.5, -0.1])
    _, aux = attention_and_aux(q, k, v, Duo(1, 2, reg_weight=2.0), causal=True, params={"gate": gate})
    assert torch.allclose(aux.losses["gates"], torch.tensor(0.6))


GATES = {
    "layers.0": torch.tensor([0.9, 0.1]),
    "layers.1": torch.tensor([1.4, 1.1]),
    "layers.2": torch.tensor([0.0, 0.2]),
}
STREAM = {"window": {"window": 8, "sinks": 2}}


@pytest.mark.parametrize(
    ("how", "wishes"),
    [
        ({"sparsity": 0.5}, [{"split": {"2,3": STREAM, "rest": "keep"}}, "keep", STREAM]),
        ({"sparsity": 0.0}, ["keep"] * 3),
        ({"sparsity": 1.0}, [STREAM] * 3),
        ({"threshold": 0.15}, [{"split": {"2,3": STREAM, "rest": "keep"}}, "keep",
                               {"split": {"0,1": STREAM, "rest": "keep"}}]),
    ],
)  # fmt: skip
def test_heads_are_told_apart(how: dict[str, float], wishes: list[object]) -> None:
    recipe = classify(GATES, 4, sink_size=2, recent_size=8, **how)
    assert [site["attention"] for site in recipe["sites"]] == wishes
    assert [site["match"] for site in recipe["sites"]] == list(GATES)


def test_equal_gates_still_give_the_asked_share() -> None:
    recipe = classify({f"layers.{n}": torch.ones(4) for n in range(8)}, 4, sparsity=0.25)
    streaming = [site["attention"] for site in recipe["sites"] if site["attention"] != "keep"]
    count = sum(len(next(iter(wish["split"])).split(",")) if "split" in wish else 4 for wish in streaming)
    assert count == 8


def test_gates_that_do_not_fit_are_refused() -> None:
    with pytest.raises(Refused, match="one gate per key head"):
        classify({"layers.0": torch.ones(3)}, 4)
    q, k, v = problem(5)
    with pytest.raises(Refused, match="duo is causal self-attention"):
        attention(q, k, v, "duo")


def test_gates_of_a_llama_are_trained_and_become_its_recipe(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
                       vocab_size=60, num_hidden_layers=2)
    ).eval()  # fmt: skip
    ids = torch.randint(1, 60, (2, 12))
    knobs = {"sink_size": 1, "recent_size": 2}
    gated = reattend.optimize(
        model, {"version": 1, "sites": [{"match": "*", "attention": {"duo": knobs}}]}, {"input_ids": ids}
    )
    wanted = model(input_ids=ids).logits
    logits = gated(input_ids=ids).logits
    assert torch.allclose(logits, wanted, atol=1e-5), "gates of 1 are the model"
    gates = gates_of(gated)
    assert list(gates) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    (sum(gated.losses().values()) + (logits - wanted.detach()).square().mean()).backward()  # type: ignore[arg-type]
    with torch.no_grad():
        for n, gate in enumerate(gates.values()):
            assert gate.grad is not None and bool((gate.grad > 0).all()), "the loss asks for smaller gates"
            gate[n] = 0.0
    written = tmp_path / "duo.yaml"
    written.write_text(yaml.safe_dump(classify(gates, 4, threshold=0.5, **knobs)))
    fast = reattend.optimize(model, str(written), {"input_ids": ids})
    assert torch.allclose(fast(input_ids=ids).logits, gated(input_ids=ids).logits, atol=1e-5)


def test_full_heads_first_are_the_same_model_in_runs_of_heads() -> None:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(hidden_size=32, num_attention_heads=8, num_key_value_heads=4, intermediate_size=64,
                       vocab_size=60, num_hidden_layers=2, attention_bias=True)
    ).eval()  # fmt: skip
    ids = torch.randint(1, 60, (2, 12))
    gates = {
        "model.layers.0.self_attn": torch.tensor([0.1, 0.9, 0.2, 0.8]),
        "model.layers.1.self_attn": torch.tensor([0.9, 0.8, 0.1, 0.2]),
    }
    plain, ordered = (
        classify(gates, 8, threshold=0.5, sink_size=1, recent_size=2, reorder=how) for how in (False, True)
    )
    assert ordered["passes"] == [{"head_order": {"orders": [["model.layers.0.self_attn", [1, 3, 0, 2]]]}}]
    assert [next(iter(site["attention"]["split"])) for site in ordered["sites"]] == ["4,5,6,7"] * 2
    wanted, got = (reattend.optimize(model, recipe, {"input_ids": ids}) for recipe in (plain, ordered))
    assert torch.allclose(got(input_ids=ids).logits, wanted(input_ids=ids).logits, atol=1e-5)
    keys, before = (m.model.layers[0].self_attn.k_proj.weight.reshape(4, 4, 32) for m in (got, model))
    assert torch.equal(keys, before[[1, 3, 0, 2]])
    with pytest.raises(Refused, match="no heads group at 'nowhere'"):
        reattend.optimize(
            model, {"version": 1, "passes": [{"head_order": {"orders": [["nowhere", [0]]]}}]}, {"input_ids": ids}
        )
