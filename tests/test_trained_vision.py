"""The pictures and the training of the vision model: the same every time, classes that need places, exact resume."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from reattend import Refused
from reattend.models import load
from reattend.models.load import load_model
from reattend.models.training.images import CLASSES, SIZE, picture, pictures
from reattend.models.training.vision import (
    TEST_PICTURES,
    TEST_SEED,
    Phase,
    Plan,
    VisionRun,
    accuracy,
    batch,
    standing_out,
)

TINY = Plan(pictures=3, rates=((0, 0.5), (4, 1.0)), phases=(Phase(2, 16), Phase(4, 256)))


def test_a_picture_is_decided_by_seed_and_index() -> None:
    images, labels = pictures(5, 10, 4)
    again, label = picture(5, 12)
    assert np.array_equal(images[2], again) and labels[2] == label
    assert not np.array_equal(picture(6, 12)[0], again)
    assert images.shape == (4, 3, SIZE, SIZE) and images.dtype == np.float32 and len(CLASSES) == 24


def test_every_class_comes_about_equally_often() -> None:
    _, labels = pictures(1, 0, 480)
    assert np.bincount(labels, minlength=24).min() >= 8


def test_turned_around_a_quarter_is_another_quarter() -> None:
    """What names the class is where the disc is: the half with the disc differs more from the ground."""
    sides: dict[str, list[bool]] = {}
    for index in range(400):
        image, label = picture(2, index)
        if CLASSES[label].startswith(("disc upper", "disc lower")):
            away = np.abs(image - np.median(image, axis=(1, 2), keepdims=True)).sum(0)
            spread = np.median(away)
            strong = np.where(away > 4 * spread, away, 0)
            left, right = strong[:, : SIZE // 2].sum(), strong[:, SIZE // 2 :].sum()
            sides.setdefault(CLASSES[label].split()[-1], []).append(right > left)
    assert np.mean(sides["right"]) > 0.8 and np.mean(sides["left"]) < 0.2


def test_training_and_test_pictures_are_different_ones() -> None:
    assert Plan().seed != TEST_SEED and len(CLASSES) * 50 <= TEST_PICTURES


def test_patches_are_drawn_anew_for_every_picture() -> None:
    images, _, kept = batch(TINY, 0)
    assert kept.shape == (3, 16) and not torch.equal(kept[0], kept[1])
    assert standing_out(images.numpy()).shape == (3, 256)
    assert bool((kept.diff(dim=1) > 0).all())
    assert torch.equal(batch(TINY, 3)[2], torch.arange(256).expand(3, 256))


def test_a_run_that_was_interrupted_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = VisionRun(TINY, tmp_path / "whole")
    whole.train()
    cut = VisionRun(TINY, tmp_path / "cut")
    cut._one_step()
    cut._one_step()
    cut.keep()
    resumed = VisionRun(TINY, tmp_path / "cut")
    assert resumed.step == 2
    resumed.train()
    mine = dict(resumed.model.state_dict())
    assert all(torch.equal(mine[name], value) for name, value in whole.model.state_dict().items())


def test_a_checkpoint_of_another_plan_is_not_resumed(tmp_path: Path) -> None:
    VisionRun(TINY, tmp_path).keep()
    with pytest.raises(SystemExit, match="another plan"):
        VisionRun(Plan(seed=1), tmp_path)


def test_a_model_without_weights_says_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "TRAINED", tmp_path)
    with pytest.raises(Refused, match=r"byte_lm: no weights in .*reattend\.models\.training\.language"):
        load_model("byte_lm")
    with pytest.raises(Refused, match=r"shapes_vit: no weights in .*reattend\.models\.training\.vision"):
        load_model("shapes_vit")


@pytest.mark.slow
def test_the_shipped_model_is_as_good_as_its_file_says() -> None:
    said = json.loads((load.TRAINED / "shapes_vit" / "training.json").read_text())["test_accuracy"]
    loaded = load_model("shapes_vit")
    assert loaded.model.dtype == torch.float32 and loaded.kwargs["pixel_values"].shape == (8, 3, SIZE, SIZE)
    found = accuracy(loaded.model, 240)["accuracy"]
    assert abs(found - said) < 4 * (said * (1 - said) / 240) ** 0.5 + 0.005, "four standard errors of 240 pictures"
