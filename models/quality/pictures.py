"""The picture model's task: the share of test pictures that are named rightly."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch

from .task import KL, TOP1, Measure, Part, Tally, Task, agreement

DEFINITION = 1  # raised whenever a number would come out differently
PICTURES, BATCH = 960, 48
Draw = Callable[
    [int, int], tuple[np.ndarray, np.ndarray]
]  # (first, count) -> pictures (count, 3, h, w), labels (count,)


def pictures(draw: Draw, classes: int, count: int = PICTURES) -> Task:
    """The first `count` pictures that `draw` gives, in batches of one size."""
    batch = min(BATCH, count)
    images, labels = draw(0, count // batch * batch)
    print_of = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    settings = {"definition": DEFINITION, "pictures": len(labels), "batch": batch, "data": print_of}
    accuracy = Measure("accuracy", "test pictures named rightly", True, 1 / classes)
    return Task("pictures", (accuracy, TOP1, KL), settings, lambda: _parts(images, labels, batch))


def _parts(images: np.ndarray, labels: np.ndarray, batch: int) -> tuple[Part, ...]:
    starts = range(0, len(labels), batch)
    calls = tuple(((), {"pixel_values": torch.from_numpy(images[first : first + batch])}) for first in starts)
    names = torch.from_numpy(labels.astype(np.int64)).split(batch)

    def judge(number: int, got: torch.Tensor, before: torch.Tensor | None) -> Tally:
        assert before is not None
        right = (got.argmax(-1) == names[number]).sum().item()
        return {"accuracy": (float(right), float(batch))} | agreement(got, before)

    return (Part(calls, judge, against=True),)
