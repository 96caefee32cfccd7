"""The text, the recall tasks and the training of the byte model: the same every time, and exact where resumed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from reattend.models.training.language import LanguageRun, Phase, Plan, batch, byte_llama, loss_of
from reattend.models.training.muon import orthogonal
from reattend.models.training.recall import TASKS, one_passkey
from reattend.models.training.text import standard_library

TRAIN, HELD_OUT = standard_library()
TINY = Plan(steps=3, tokens=1024, phases=(Phase(1.0, 512, 0.5),))


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


@pytest.mark.parametrize("sizes", [(8, 8), (6, 20), (20, 6)])
def test_orthogonal_brings_singular_values_near_one(sizes: tuple[int, int]) -> None:
    values = torch.linalg.svdvals(orthogonal(torch.randn(sizes)))
    assert bool(((values > 0.3) & (values < 1.3)).all())
