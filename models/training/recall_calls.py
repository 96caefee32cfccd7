"""Recall tasks as calls of a byte model: inputs whose answers stand in them, and where."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...compiler.refusal import Refused, nearest
from .recall import TASKS, Sample
from .text import standard_library

Source = tuple[int, int, int]  # sample, the row that gives a byte, where that byte stands


def recall_call(
    task: str, length: int = 512, samples: int = 4, seed: int = 0
) -> tuple[dict[str, Tensor], tuple[Source, ...]]:
    """Arguments (samples, length) in held-out text, and the source of every answered byte."""
    if task not in TASKS:
        raise Refused(f"task {task!r}", fits=nearest(task, TASKS))
    if length < 64:
        raise Refused(f"length {length}", where=task, fits="at least 64 bytes")
    _, held_out = standard_library()
    made = [TASKS[task](np.random.default_rng((seed, number)), held_out, length) for number in range(samples)]
    ids = torch.from_numpy(np.stack([sample.bytes for sample in made]).astype(np.int64))
    return {"input_ids": ids}, tuple((n, *pair) for n, sample in enumerate(made) for pair in sources_of(sample))


def sources_of(sample: Sample) -> list[tuple[int, int]]:
    """For every answered byte the row before it, and the place that it repeats."""
    return [
        (byte - 1, byte - answer.distance)
        for answer in sample.answers
        for byte in range(answer.start, answer.start + answer.length)
    ]
