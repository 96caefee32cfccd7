"""Recovery on tiny models: what is trained comes nearer the original, which stays as it was; a stopped run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from small_models import stack, words
from torch import Tensor, nn

import reattend
from reattend.compiler.hosting import hosting
from reattend.compiler.mechanism import _REGISTRY
from reattend.compiler.ownership import share_memory
from reattend.compiler.recovery.plan import Plan

QUICK: dict[str, Any] = {"progress": False, "every": 4, "steps": 8, "lr": 5e-3}


@pytest.fixture(scope="module", autouse=True)
def scaled() -> Iterator[None]:
    """A core with a learned tensor that starts wrong: softmax attention times a gain per head, which should be 1."""

    @reattend.register("scaled")
    @dataclass(frozen=True)
    class Scaled(reattend.Mechanism):
        """Softmax attention times the square root of a gain per head."""

        start: float = 0.25
        kind = "needs recovery"

        def params(self, site: Any) -> dict[str, reattend.Param]:
            return {"gain": reattend.Param((site.heads, 1, 1), lambda t: t.fill_(self.start))}

        def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return reattend.attend(q, k, v, site=site) * p.gain.sqrt()

    yield
    del _REGISTRY["scaled"]


def everywhere(mechanism: Any, **more: Any) -> dict[str, Any]:
    return {"version": 1, "sites": [{"match": "*", "attention": mechanism}], **more}


def llama() -> Any:
    torch.manual_seed(0)
    config = dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, vocab_size=60)
    config |= dict(num_hidden_layers=1, use_cache=False, pad_token_id=0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**config)).eval()


def texts(count: int = 12, rows: int = 2, length: int = 16) -> list[dict[str, Tensor]]:
    drawn = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(1, 60, (rows, length), generator=drawn)} for _ in range(count)]


def hidden(count: int = 12) -> list[tuple[Tensor, ...]]:
    drawn = torch.Generator().manual_seed(1)
    return [(torch.randn(2, 10, 32, generator=drawn),) for _ in range(count)]


def optimized(model: nn.Module, recipe: Any, inputs: Any) -> Any:
    return reattend.optimize(model, recipe, inputs, measure=False)


def weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


# --- what is trained --------------------------------------------------------------------------------------------------


def test_new_tensors_alone_learn_what_they_should_be() -> None:
    """The gain that gives the original is 1; transfer finds it site by site, and nothing else moves or is copied."""
    model = stack(1)
    before = weights(model)
    fast = optimized(model, everywhere({"scaled": {"start": 0.25}}), hidden()[0])
    assert "UNTRAINED" in fast.report.verdict()
    got = reattend.recover(fast, hidden(), transfer=1.0, **QUICK | {"steps": 60, "lr": 5e-2, "every": 20})
    gains = [p for _, p in fast.new_parameters()]
    assert len(gains) == 1 and all(((g - 1).abs() < 0.1).all() for g in gains)
    assert got.after["error"] < 1e-2 * got.before["error"] and got.after["sites"] < 1e-2 * got.before["sites"]
    assert same(weights(model), before)
    assert share_memory(model.layers[0].attn.q_proj.weight, fast.layers[0].attn.q_proj.weight)
    assert "recovered: held-out error" in fast.report.verdict() and "UNTRAINED" not in fast.report.verdict()
    assert all(p.requires_grad and p.grad is None for p in fast.parameters())


def test_low_rank_deltas_are_merged_into_weights_of_its_own() -> None:
    model = words()
    before = weights(model)
    fast = optimized(model, everywhere("linear"), texts()[0])
    got = reattend.recover(fast, texts(), train="lora", rank=2, transfer=0.0, **QUICK | {"steps": 24})
    assert got.after["kl"] < got.before["kl"] and got.trained == 2 * (4 * 32 + 32 + 32 + 2 * 16)
    assert same(weights(model), before)
    changed = {n for n, t in fast.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {f"body.layers.0.attn.{n}_proj.weight" for n in "qkvo"}
    assert all(torch.linalg.matrix_rank(fast.state_dict()[n] - before[n], rtol=1e-4) == 2 for n in changed)
    assert fast.report.output.kl == pytest.approx(got.after["kl"], rel=1e-4)
    assert not share_memory(model.body.layers[0].attn.q_proj.weight, fast.body.layers[0].attn.q_proj.weight)


def test_deltas_may_stay_apart_and_be_merged_by_torch() -> None:
    from torch.nn.utils import parametrize

    runs = []
    for merge in (True, False):
        fast = optimized(words(), everywhere("linear"), texts()[0])
        reattend.recover(fast, texts(), train="lora", rank=2, merge=merge, **QUICK)
        runs.append(fast)
    merged, apart = runs
    x = texts(20)[-1]["input_ids"]
    mask = torch.ones_like(x)
    assert parametrize.is_parametrized(apart.body.layers[0].attn.q_proj)
    torch.testing.assert_close(apart(x)["logits"], merged(x)["logits"])
    torch.testing.assert_close(apart(x, mask)["logits"], merged(x, mask)["logits"])  # a signature of its own
    for name in "qkvo":
        parametrize.remove_parametrizations(getattr(apart.body.layers[0].attn, f"{name}_proj"), "weight")
    torch.testing.assert_close(apart(x)["logits"], merged(x)["logits"])


@pytest.mark.parametrize(("train", "count"), [("sites", 4), ("all", 19)])
def test_weights_themselves(train: str, count: int) -> None:
    model = words()
    before = weights(model)
    fast = optimized(model, everywhere("linear"), texts()[0])
    got = reattend.recover(fast, texts(), train=train, transfer=0.0, **QUICK | {"lr": 1e-3})
    changed = [n for n, t in fast.state_dict().items() if not torch.equal(t, before[n])]
    assert got.after["kl"] < got.before["kl"] and len(changed) == count
    assert same(weights(model), before)


def test_transfer_teaches_the_projections_in_front_of_a_site() -> None:
    """Without tensors of its own to learn, a site learns by q, k and v, from the hidden state of the teacher."""
    model = stack(1)
    fast = optimized(model, everywhere({"scaled": {"start": 1.0}}), hidden()[0])
    with torch.no_grad():
        fast.layers[0].attn.v_proj.weight.mul_(0.5)
    more = {"train": "sites", "transfer": 1.0, "teacher": model, "steps": 24, "lr": 1e-2}
    got = reattend.recover(fast, hidden(), **QUICK | more)
    assert got.after["sites"] < 0.5 * got.before["sites"] and got.after["error"] < got.before["error"]
    assert [h["stage"] for h in got.history] == ["transfer"] * 7


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    fast = optimized(stack(1), everywhere({"scaled": {"start": 1.0}}), hidden()[0])
    got = reattend.recover(fast, hidden(), **QUICK)
    assert got.before["error"] < 1e-12 and got.best_at in (0, *range(4, 9))
    assert all((p - 1).abs().max() < 1e-4 for _, p in fast.new_parameters())


# --- how --------------------------------------------------------------------------------------------------------------


def test_two_runs_of_one_seed_are_equal_and_leave_torchs_generator_alone() -> None:
    found = []
    for seed in (3, 3, 4):
        fast = optimized(words(), everywhere("linear"), texts()[0])
        state = torch.get_rng_state()
        reattend.recover(fast, texts(), train="lora", seed=seed, **QUICK)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(weights(fast))
    assert same(found[0], found[1]) and not same(found[0], found[2])


def test_accumulated_calls_are_one_larger_call() -> None:
    """All rows are equally long, so that a mean over calls is a mean over rows."""
    found = []
    for how in ({"accumulate": 2}, {"batch": 2}):
        fast = optimized(words(), everywhere("linear"), texts()[0])
        reattend.recover(fast, texts(), train="sites", transfer=0.0, **QUICK | {"steps": 2, "every": 2}, **how)
        found.append(weights(fast))
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], atol=2e-4, rtol=0)  # AdamW scales last places up


def test_bfloat16_while_training() -> None:
    fast = optimized(words(), everywhere({"window": {"window": 4, "sinks": 1}}), texts()[0])
    got = reattend.recover(fast, texts(), train="lora", bfloat16=True, **QUICK | {"steps": 24})
    assert got.after["kl"] < got.before["kl"]
    assert {p.dtype for p in fast.parameters()} == {torch.float32}


def test_a_stage_ends_early_without_gains() -> None:
    fast = optimized(stack(1), everywhere({"scaled": {"start": 1.0}}), hidden()[0])
    got = reattend.recover(fast, hidden(), patience=1, **QUICK | {"steps": 400, "every": 1})
    assert got.steps < 100


def test_the_labels_of_calls_take_part() -> None:
    labelled = [call | {"labels": call["input_ids"]} for call in texts()]
    fast = optimized(words(), everywhere("linear"), texts()[0])
    got = reattend.recover(fast, labelled, train="lora", ce=0.5, **QUICK | {"steps": 24})
    assert got.after["ce"] < got.before["ce"] and got.after["held_out"] < got.before["held_out"]
    with pytest.raises(reattend.Refused, match="ce > 0, and the model gives no loss"):
        reattend.recover(optimized(words(), everywhere("linear"), texts()[0]), texts(), train="lora", ce=0.5, **QUICK)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_relations_of_the_last_site(version: str) -> None:
    fast = optimized(words(), everywhere("linear"), texts()[0])
    got = reattend.recover(fast, texts(), train="lora", transfer=0.0, relations=version, **QUICK | {"steps": 16})
    assert got.after["kl"] < got.before["kl"]


def test_auxiliary_losses_take_part() -> None:
    moh = {"version": 1, "sites": [{"match": "*", "heads": {"moh": {"shared_heads": 2, "routed_heads": 1}}}]}
    fast = optimized(words(), moh, texts()[0])
    before = {n: p.detach().clone() for n, p in fast.new_parameters()}
    reattend.recover(fast, texts(), **QUICK | {"every": 8})
    assert all(not torch.equal(p, before[n]) for n, p in fast.new_parameters()) or fast.report.recovered


def test_a_judge_is_heard_and_calls_may_be_made_on_the_way() -> None:
    asked: list[int] = []

    def made(number: int) -> dict[str, Tensor]:
        asked.append(number)
        drawn = torch.Generator().manual_seed(100 + number)
        return {"input_ids": torch.randint(1, 60, (2, 16), generator=drawn)}

    def judge(model: Any) -> dict[str, float]:
        assert not model.training and not torch.is_grad_enabled()
        torch.rand(3)  # must not move the run
        return {"largest": model(**texts()[0])["logits"].max().item()}

    fast = optimized(words(), everywhere("linear"), texts()[0])
    got = reattend.recover(fast, made, held_out=texts(2), judge=judge, train="lora", **QUICK)
    assert all("largest" in one for one in got.history) and set(range(8)) <= set(asked)


# --- stopped and resumed ----------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("stop", [3, 7])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, stop: int) -> None:
    """Stopped between two checkpoints of either stage; dropout draws random numbers, so these must be kept as well."""

    def run(folder: Path | None, stop: int = 0) -> Any:
        fast = optimized(words(dropout=0.2).train(), everywhere("linear"), texts()[0])
        calls = texts()

        def given(number: int) -> dict[str, Tensor]:
            if stop and number == stop:
                raise Stopped
            return calls[2 + number % 10]

        got = reattend.recover(fast, given, held_out=calls[:2], folder=folder, train="all", **QUICK | {"every": 2})
        return fast, got

    whole, first = run(None)
    with pytest.raises(Stopped):
        run(tmp_path, stop)
    again, second = run(tmp_path)
    assert same(weights(again), weights(whole))
    assert [{**h} for h in second.history] == [{**h} for h in first.history]
    _, third = run(tmp_path)  # a finished run is read, not run again
    assert third.history == second.history


def test_a_model_is_as_it_was_after_an_interruption() -> None:
    fast = optimized(words(), everywhere("linear"), texts()[0])
    before = weights(fast)

    def given(number: int) -> Any:
        if number == 5:
            raise KeyboardInterrupt
        return texts()[number]

    with pytest.raises(KeyboardInterrupt):
        reattend.recover(fast, given, held_out=texts(14)[-2:], train="all", **QUICK)
    assert same(weights(fast), before) and all(p.requires_grad for p in fast.parameters())


def test_what_a_judge_measures_may_be_any_number(tmp_path: Path) -> None:
    """Numbers of numpy among them: a checkpoint that holds one is not read again."""
    judge = lambda model: {"largest": np.float64(1.5)}
    for _ in range(2):
        fast = optimized(words(), everywhere("linear"), texts()[0])
        got = reattend.recover(fast, texts(), folder=tmp_path, judge=judge, train="lora", **QUICK | {"steps": 2})
    assert all(type(one["largest"]) is float for one in got.history)


@pytest.mark.slow
def test_another_plan_data_or_weights_in_the_folder_are_refused(tmp_path: Path) -> None:
    def run(model: Any, data: Any = None, **more: Any) -> None:
        fast = optimized(model, everywhere("linear"), texts()[0])
        reattend.recover(fast, data or texts(), folder=tmp_path, **{**QUICK, "train": "lora", "steps": 4, **more})

    run(words())
    with pytest.raises(reattend.Refused, match=r"lr=0\.005 there, 0\.1 here"):
        run(words(), lr=0.1)
    with pytest.raises(reattend.Refused, match="other data"):
        run(words(), texts(10))
    other = words()
    other.body.layers[0].attn.q_proj.weight.data.mul_(2)
    with pytest.raises(reattend.Refused, match="began from other weights"):
        run(other)
    (tmp_path / "recovery.pt").write_bytes(b"no")
    with pytest.raises(reattend.Refused, match=r"recovery\.pt"):
        run(words())


# --- bad input --------------------------------------------------------------------------------------------------------


def test_nothing_trainable_is_said_before_starting() -> None:
    fast = optimized(words(), everywhere("linear"), texts()[0])
    with pytest.raises(reattend.Refused, match=r"nothing to train: train=new, .* at body\.layers\.0\.attn: train"):
        reattend.recover(fast, texts(), **QUICK)
    plain = optimized(words(), "exact", texts()[0])
    with pytest.raises(reattend.Refused, match="no rewritten site"):
        reattend.recover(plain, texts(), train="lora", **QUICK)


def test_rows_that_are_trained_and_judged_on_are_refused() -> None:
    fast = optimized(words(), everywhere("linear"), texts()[0])
    held = [{"input_ids": torch.cat([texts(20)[-1]["input_ids"][:1], texts()[3]["input_ids"][1:]])}]
    fits = r"data\[3\]: row 1 is held_out\[0\] row 1 as well: verification data equal to training data"
    with pytest.raises(reattend.Refused, match=fits):
        reattend.recover(fast, texts(), held_out=held, train="lora", **QUICK)
    with pytest.raises(reattend.Refused, match="data, call 3: row 1 is held_out"):
        reattend.recover(fast, lambda k: texts()[k], held_out=held, train="lora", **QUICK)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"input_idz": torch.ones(2, 4).long()}, "argument 'input_idz': did you mean 'input_ids'"),
        ({"input_ids": torch.ones(2, 4)}, r"argument 'input_ids' is float32 2d: captured: int64 2d"),
        ({"input_ids": torch.ones(4).long()}, "argument 'input_ids' is int64 1d"),
        ({"attention_mask": torch.ones(2, 4).long()}, "missing a required argument: 'input_ids'"),
        ((torch.ones(2, 4).long(), 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12), "too many positional"),
    ],
)
def test_data_that_does_not_fit_names_the_argument(call: Any, says: str) -> None:
    fast = optimized(words(), everywhere("linear"), texts()[0])
    with pytest.raises(reattend.Refused, match=says):
        reattend.recover(fast, [call, *texts()], train="lora", **QUICK)


def test_other_mistakes_are_refused_with_the_way_out() -> None:
    fast = optimized(words(), everywhere("linear"), texts()[0])
    for more, says in (
        ({"trian": "all"}, "trian='all': did you mean 'train'"),
        ({"train": "some"}, "new, lora, sites, all"),
        ({"steps": 0}, "at least 1"),
        ({"lr": float("nan")}, "a number above 0"),
        ({"kl": 0.0, "train": "lora"}, "a loss for the second stage"),
    ):
        with pytest.raises(reattend.Refused, match=says):
            reattend.recover(fast, texts(), **QUICK | more)
    with pytest.raises(reattend.Refused, match="no data: calls like"):
        reattend.recover(fast, [], train="lora", **QUICK)
    with pytest.raises(reattend.Refused, match="none held out"):
        reattend.recover(fast, texts(1), train="lora", **QUICK)
    with pytest.raises(reattend.Refused, match="holds no graph"):
        reattend.recover(words(), texts(), train="lora", **QUICK)
    with pytest.raises(reattend.Refused, match="equal lengths"):
        reattend.recover(fast, [*texts(2, length=8), *texts(4)], train="lora", batch=3, **QUICK)
    reattend.recover(fast, texts(), train="lora", **QUICK | {"steps": 4})
    with pytest.raises(reattend.Refused, match="trained already"):
        reattend.recover(fast, texts(), train="lora", **QUICK)
    reattend.recover(fast, texts(), train="lora", teacher=words(), **QUICK | {"steps": 4})


@pytest.mark.parametrize(("transfer", "every"), [(1.0, 8), (0.0, 8), (0.0, 1)])
def test_a_loss_that_is_no_number_stops_at_the_best_weights_and_names_the_site(transfer: float, every: int) -> None:
    """A gain that the second step drives below 0 has no square root."""
    fast = optimized(stack(1), everywhere({"scaled": {"start": 4.0}}), hidden()[0])
    more = {"steps": 40, "lr": 3.0, "every": every, "transfer": transfer}
    best = 1 if every == 1 else 0
    says = rf"recover: layers\.0\.attn: .* nan after step 2: .*best judged, of step {best}; a smaller lr"
    with pytest.raises(reattend.Refused, match=says):
        reattend.recover(fast, hidden(), **QUICK | more)
    for _, gain in fast.new_parameters():
        assert torch.allclose(gain, torch.tensor(2.5 if best else 4.0), atol=0.01)
    assert torch.isfinite(fast(*hidden()[0])).all()


# --- the recipe -------------------------------------------------------------------------------------------------------


def test_a_recipes_bounds_wait_for_recovery_and_hold_after_it() -> None:
    recipe = everywhere({"scaled": {"start": 0.25}}, verify={"max_error": 0.02},
                        recover={"train": "new", "steps": 60, "lr": 5e-2})  # fmt: skip
    fast = optimized(stack(2), recipe, hidden()[0])
    assert [row.status for row in fast.sites] == ["rewritten"] * 2
    assert "the bounds wait for recover()" in fast.report.notes
    reattend.recover(fast, hidden(), transfer=1.0, progress=False, every=20)
    assert [row.status for row in fast.sites] == ["rewritten"] * 2 and fast.report.output.relative < 0.02


@pytest.mark.parametrize("otherwise", ["rollback", "refuse", "warn"])
def test_bounds_that_still_do_not_hold(otherwise: str) -> None:
    recipe = everywhere({"scaled": {"start": 0.25}}, verify={"max_error": 1e-7, "else": otherwise},
                        recover={"steps": 4})  # fmt: skip
    model = stack(2)
    fast = optimized(model, recipe, hidden()[0])
    if otherwise == "refuse":
        with pytest.raises(reattend.Refused, match="recover: max_error: .* is beyond 1e-07: more steps"):
            reattend.recover(fast, hidden(), progress=False)
        return
    reattend.recover(fast, hidden(), progress=False)
    if otherwise == "warn":
        assert "after recovery max_error" in fast.report.warnings[-1]
        return
    assert [row.status for row in fast.sites] == ["rolled back"] * 2 and not list(fast.new_parameters())
    torch.testing.assert_close(fast(*hidden()[0]), model(*hidden()[0]))
    assert len(hosting(fast).graphs) == 1


def test_a_recipe_names_what_to_learn_from(tmp_path: Path) -> None:
    import json

    for name, calls in (("learn", texts(10, rows=1)), ("judge", texts(14, rows=1)[10:])):
        lines = [json.dumps({"input_ids": call["input_ids"][0].tolist()}) for call in calls]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "version: 1\ndata: {calibrate: learn.jsonl, verify: judge.jsonl}\nsites: [{match: '*', attention: linear}]\n"
        "recover: {train: lora, steps: 4, rank: 2, batch: 5}\n"
    )
    fast = optimized(words(), recipe, texts(1)[0])
    got = reattend.recover(fast, progress=False)
    assert (got.plan.train, got.plan.rank, got.plan.batch, got.steps) == ("lora", 2, 5, 4)
    assert fast.report.data == "4 samples of judge.jsonl"
    assert Plan().rate(0, 10) == 1e-3


def test_a_llama_is_recovered_saved_and_loaded(tmp_path: Path) -> None:
    fast = optimized(llama(), everywhere("linear"), texts()[0])
    for name, says in (("input_idz", "did you mean 'input_ids'"), ("attention_mask", "no argument 'input_ids'")):
        with pytest.raises(reattend.Refused, match=says):
            reattend.recover(fast, [{name: torch.ones(2, 4).long()}, *texts()], train="lora", **QUICK)
    reattend.recover(fast, texts(), train="lora", **QUICK | {"steps": 4})
    reattend.save(fast, tmp_path)
    again = reattend.load(tmp_path)
    x = texts()[0]["input_ids"]
    torch.testing.assert_close(again(x).logits, fast(x).logits)
    assert again.report.recovered == fast.report.recovered
