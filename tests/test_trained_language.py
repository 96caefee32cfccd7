"""The text, the recall tasks and the training of the byte model: the same every time, and exact where resumed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from reattend import optimize
from reattend.compiler.refusal import Refused
from reattend.models import load
from reattend.models.load import load_model
from reattend.models.quality.language import whole
from reattend.models.training.language import LanguageRun, Phase, Plan, batch, byte_llama, judged, loss_of
from reattend.models.training.muon import orthogonal
from reattend.models.training.recall import TASKS, one_passkey, pairs, passkey
from reattend.models.training.recall_calls import recall_call
from reattend.models.training.text import standard_library

TRAIN, HELD_OUT = standard_library()
TINY = Plan(steps=3, tokens=1024, phases=(Phase(3, 512, 0.5),))


def test_no_file_is_both_trained_on_and_held_out() -> None:
    assert TRAIN.names and HELD_OUT.names and not set(TRAIN.names) & set(HELD_OUT.names)
    assert np.array_equal(HELD_OUT.windows(64, 5), HELD_OUT.windows(64, 5))


@pytest.mark.parametrize("length", [128, 256, 1024])
@pytest.mark.parametrize("name", TASKS)
def test_an_answer_stands_earlier_and_only_what_can_be_known_counts(name: str, length: int) -> None:
    for seed in range(5):
        sample = TASKS[name](np.random.default_rng(seed), TRAIN, length)
        assert len(sample.bytes) == len(sample.weight) == length and sample.answers
        for answer in sample.answers:
            here, back = answer.start, answer.start - answer.distance
            assert np.array_equal(sample.bytes[here : here + answer.length], sample.bytes[back : back + answer.length])
            assert (sample.weight[here : here + answer.length] > 0).all()
        first = sample.answers[0]
        assert (sample.weight[first.start - first.distance :][:2] == 0).all()  # random there: nobody could know it


def test_one_passkey_stands_as_far_back_as_is_asked_for() -> None:
    sample = one_passkey(np.random.default_rng(0), HELD_OUT, 512, 300)
    (answer,) = sample.answers
    assert answer.distance == 300 and answer.start + answer.length == 511  # a line end follows


def test_passkeys_stand_as_dense_as_is_asked_for() -> None:
    few, many = (passkey(np.random.default_rng(0), TRAIN, 512, every) for every in (256, 64))
    assert (len(few.answers), len(many.answers)) == (2, 8)


def test_the_rate_falls_twice() -> None:
    plan = Plan()
    rates = [plan.rate(step) for step in range(plan.steps)]
    assert rates[plan.warmup] == 1.0 and rates[plan.turn - 1] == 0.02 and rates[plan.turn] == plan.again
    assert rates[plan.turn :] == sorted(rates[plan.turn :], reverse=True)


@pytest.mark.parametrize("task", TASKS)
def test_the_sources_of_a_call_are_where_its_answers_stand(task: str) -> None:
    call, sources = recall_call(task, 256, samples=3, seed=4)
    ids = call["input_ids"]
    assert ids.shape == (3, 256) and {sample for sample, _, _ in sources} == {0, 1, 2}
    assert all(ids[sample, row + 1] == ids[sample, place] and place <= row for sample, row, place in sources)
    assert torch.equal(ids, recall_call(task, 256, samples=3, seed=4)[0]["input_ids"])


def test_a_call_of_an_unknown_task_or_without_room_is_refused() -> None:
    with pytest.raises(Refused, match=r"task 'passkeys'.*passkey"):
        recall_call("passkeys")
    with pytest.raises(Refused, match=r"passkey: length 32.*at least 64"):
        recall_call("passkey", 32)


def test_a_batch_is_decided_by_its_step() -> None:
    rows, weights = batch(TINY, TRAIN, 1)
    again, _ = batch(TINY, TRAIN, 1)
    assert rows.shape == weights.shape == (2, 512) and torch.equal(rows, again)
    assert not torch.equal(rows, batch(TINY, TRAIN, 2)[0])


def test_a_loss_weighs_bytes() -> None:
    torch.manual_seed(0)
    model, rows = byte_llama(), torch.randint(256, (1, 12))
    weights = torch.zeros(1, 12)
    weights[0, 5] = 3.0
    alone = torch.nn.functional.cross_entropy(model(input_ids=rows).logits[:, 4], rows[:, 5])
    torch.testing.assert_close(loss_of(model, rows, weights), alone)


@pytest.mark.slow
def test_a_run_that_was_interrupted_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = LanguageRun(TINY, tmp_path / "whole")
    whole.train()
    cut = LanguageRun(TINY, tmp_path / "cut")
    cut._one_step()
    cut.keep()
    resumed = LanguageRun(TINY, tmp_path / "cut")
    assert resumed.step == 1
    resumed.train()
    mine = resumed.model.state_dict()
    assert all(torch.equal(mine[name], value) for name, value in whole.model.state_dict().items())
    with pytest.raises(SystemExit, match="another plan"):
        LanguageRun(Plan(steps=4), tmp_path / "cut")


@pytest.mark.slow
def test_the_shipped_model_is_as_good_as_its_file_says_and_needs_its_context() -> None:
    said = json.loads((load.TRAINED / "byte_lm" / "training.json").read_text())
    model = load_model("byte_lm").model
    assert model.dtype == torch.float32 and said["plan"] == json.loads(json.dumps(asdict(Plan())))
    found = judged(model, HELD_OUT, 2048)
    if HELD_OUT.sha256 == said["held_out_sha256"]:
        assert found["bpb"] == pytest.approx(said["judged"]["bpb"], abs=0.01)
    near = optimize(model, {"version": 1, "sites": [{"match": "*", "attention": {"window": {"window": 64}}}]},
                    {"input_ids": torch.zeros(1, 2048, dtype=torch.long)}, measure=False)  # fmt: skip
    assert judged(near, HELD_OUT, 2048)["bpb"] > found["bpb"] + 0.1
    sample = pairs(np.random.default_rng(3), HELD_OUT, 2048)
    ids = torch.from_numpy(sample.bytes.astype(np.int64))[None]
    with torch.no_grad():
        (far, asked), (close, _) = (whole(one(input_ids=ids).logits, sample) for one in (model.eval(), near.eval()))
    assert far / asked > close / asked + 0.3


@pytest.mark.parametrize("sizes", [(8, 8), (6, 20), (20, 6)])
def test_orthogonal_brings_singular_values_near_one(sizes: tuple[int, int]) -> None:
    values = torch.linalg.svdvals(orthogonal(torch.randn(sizes)))
    assert bool(((values > 0.3) & (values < 1.3)).all())
